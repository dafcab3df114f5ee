import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoom_jax.ops import maps as ops_maps
from attnzoom_jax.ops.patches import crop_boxes, paste_boxes, percentile_boxes, random_boxes

RNG = np.random.default_rng(0)
IMAGES = jnp.float32(RNG.normal(size=(3, 9, 12, 2)))
BOXES = np.array([[0, 0, 9, 12], [2, 3, 7, 4], [1, 5, 8, 11]])


def slow_crop(image, box, size):
    """Pixel by pixel in float64, corners aligned."""
    y0, x0, y1, x1 = map(float, box)
    height, width = size
    out = np.zeros((height, width, image.shape[-1]))
    for i in range(height):
        for j in range(width):
            y = y0 + i * (y1 - 1 - y0) / (height - 1) if height > 1 else (y0 + y1 - 1) / 2
            x = x0 + j * (x1 - 1 - x0) / (width - 1) if width > 1 else (x0 + x1 - 1) / 2
            top, left = int(np.floor(y)), int(np.floor(x))
            for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - a - (y - top)) * abs(1 - b - (x - left))
                row = min(top + a, image.shape[0] - 1)
                column = min(left + b, image.shape[1] - 1)
                out[i, j] += weight * np.float64(image[row, column])
    return out


@pytest.mark.parametrize("size", [(6, 5), (1, 7), (14, 3)])
@pytest.mark.parametrize("boxes", [BOXES, BOXES + np.array([0.25, 0, -0.5, 0])])
def test_crop_equals_the_loop(size, boxes):
    expected = [slow_crop(image, box, size) for image, box in zip(IMAGES, boxes, strict=True)]
    np.testing.assert_allclose(crop_boxes(IMAGES, boxes, size), expected, atol=1e-5)
    jitted = jax.jit(crop_boxes, static_argnums=2)(IMAGES, boxes, size)
    np.testing.assert_allclose(jitted, expected, atol=1e-5)


def test_a_box_of_the_patches_size_is_copied():
    boxes = jnp.array([[0, 0, 4, 5], [2, 3, 6, 8], [5, 7, 9, 12]])
    patches = crop_boxes(IMAGES, boxes, (4, 5))
    for image, (y0, x0, y1, x1), patch in zip(IMAGES, np.asarray(boxes), patches, strict=True):
        np.testing.assert_array_equal(patch, image[y0:y1, x0:x1])
    whole = jnp.array([[0, 0, 9, 12]] * 3)
    np.testing.assert_array_equal(crop_boxes(IMAGES, whole, (9, 12)), IMAGES)


def test_crop_has_the_gradient_of_a_linear_map():
    weights = jnp.float32(RNG.normal(size=(3, 4, 5, 2)))
    gradient = jax.grad(lambda x: (crop_boxes(x, BOXES, (4, 5)) * weights).sum())(IMAGES)
    other = jnp.float32(RNG.normal(size=IMAGES.shape))
    np.testing.assert_allclose(
        (gradient * other).sum(), (crop_boxes(other, BOXES, (4, 5)) * weights).sum(), rtol=1e-4
    )
    assert not gradient[1, :2].any() and not gradient[1, :, 4:].any()  # outside of the box


def test_crop_keeps_the_type_of_images():
    assert crop_boxes(IMAGES.astype(jnp.bfloat16), BOXES, (4, 4)).dtype == jnp.bfloat16
    assert crop_boxes(jnp.uint8(IMAGES > 0), BOXES, (4, 4)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ([-2, 1, 5, 6], [0, 1, 5, 6]),
        ([3, 4, 20, 13], [3, 4, 9, 12]),
        ([8, 8, 8, 10], [8, 8, 9, 10]),
        ([10, 0, 14, 12], [8, 0, 9, 12]),
    ],
)
def test_a_box_that_leaves_the_image_is_an_error_or_under_jit_cut_off(box, inside):
    boxes = np.array([[0, 0, 9, 12], box, [0, 0, 9, 12]])
    with pytest.raises(ValueError, match=r"box 1 is .*inside of the image of 9 x 12 pixels") as e:
        crop_boxes(IMAGES, boxes, (4, 4))
    assert "\n" not in str(e.value)
    cut = jax.jit(crop_boxes, static_argnums=2)(IMAGES, boxes, (4, 4))
    boxes[1] = inside
    np.testing.assert_allclose(cut, crop_boxes(IMAGES, boxes, (4, 4)), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "boxes", "size", "message"),
    [
        (IMAGES, BOXES[:2], (4, 4), r"one box .*\(2, 4\)"),
        (IMAGES[0], BOXES, (4, 4), r"images \[n, h, w, c\]"),
        (IMAGES, BOXES, (4, 0), r"size is \(4, 0\)"),
    ],
)
def test_crop_of_other_shapes(images, boxes, size, message):
    with pytest.raises(ValueError, match=message):
        crop_boxes(images, boxes, size)


MAPS = jnp.float32(RNG.normal(size=(3, 4, 3)))
FRACTIONS = np.array([[0.3, 0, 8.9, 11.2], [2.5, 3.5, 7.5, 4.5], [1.75, 5.2, 2.8, 11.9]])


def slow_paste(values, box, size):
    """Pixel by pixel in float64: pixels whose centres lie in the box read the map there."""
    y0, x0, y1, x1 = map(float, box)
    (rows, columns), values = values.shape, np.asarray(values, np.float64)
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            if not (y0 <= i + 0.5 < y1 and x0 <= j + 0.5 < x1):
                continue
            y = np.clip((i + 0.5 - y0) / (y1 - y0) * rows - 0.5, 0, rows - 1)
            x = np.clip((j + 0.5 - x0) / (x1 - x0) * columns - 0.5, 0, columns - 1)
            for a in range(rows):
                for b in range(columns):
                    out[i, j] += values[a, b] * max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b))
    return out


@pytest.mark.parametrize("boxes", [BOXES, FRACTIONS], ids=["whole_numbers", "fractions"])
def test_paste_equals_the_loop(boxes):
    expected = [slow_paste(one, box, (9, 12)) for one, box in zip(MAPS, boxes, strict=True)]
    np.testing.assert_allclose(paste_boxes(MAPS, boxes, (9, 12)), expected, atol=1e-5)
    jitted = jax.jit(paste_boxes, static_argnums=2)(MAPS, boxes, (9, 12))
    np.testing.assert_allclose(jitted, expected, atol=1e-5)
    assert all(one.any() for one in expected)  # a box holds a pixel, however small


def test_pasted_into_the_whole_image_a_map_is_resized():
    whole = np.array([[0, 0, 9, 12]] * 3)
    expected = ops_maps.resize(MAPS, (9, 12))
    np.testing.assert_allclose(paste_boxes(MAPS, whole, (9, 12)), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_pasted_stays_in_its_box_and_is_cut_out_again(seed):
    boxes = np.asarray(random_boxes(jax.random.key(seed), 3, (40, 50)))
    pasted = paste_boxes(jnp.abs(MAPS) + 0.1, boxes, (40, 50))
    for one, heat, (y0, x0, y1, x1) in zip(MAPS, pasted, boxes, strict=True):
        inside = np.zeros((40, 50), bool)
        inside[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(heat > 0, inside)
        # Cut out at the box's own size nothing is interpolated.
        size = (int(y1 - y0), int(x1 - x0))
        cut = crop_boxes(heat[None, ..., None], np.array([[y0, x0, y1, x1]]), size)[0, ..., 0]
        expected = ops_maps.resize(jnp.abs(one)[None] + 0.1, size)[0]
        np.testing.assert_allclose(cut, expected, atol=1e-5)


@pytest.mark.parametrize("boxes", [BOXES, FRACTIONS[:2]], ids=["whole_numbers", "fractions"])
def test_a_patch_that_is_pasted_lies_where_it_was_cut_out(boxes):
    """On a ramp: the two conventions differ by half a pixel of the patch, and by no more."""
    y, x = np.mgrid[:9, :12]
    ramp = jnp.float32(np.stack([y + 0.1 * x] * len(boxes)))
    patches = crop_boxes(ramp[..., None], boxes, (64, 64))[..., 0]
    pasted = np.asarray(paste_boxes(patches, boxes, (9, 12)))
    is_inside = np.asarray(paste_boxes(jnp.ones((len(boxes), 1, 1)), boxes, (9, 12))) == 1
    assert np.abs(pasted - ramp)[is_inside].max() < 0.55 and not pasted[~is_inside].any()


def test_a_pasted_box_that_leaves_the_image_is_an_error_or_under_jit_cut_off():
    boxes = np.array([[-2, 1, 5, 6], [3, 4, 20, 13], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"box 0 is .*inside of the image of 9 x 12 pixels"):
        paste_boxes(MAPS, boxes, (9, 12))
    cut = jax.jit(paste_boxes, static_argnums=2)(MAPS, boxes, (9, 12))
    inside = np.array([[0, 1, 5, 6], [3, 4, 9, 12], [0, 0, 1, 1]])
    np.testing.assert_allclose(cut, paste_boxes(MAPS, inside, (9, 12)), atol=1e-6)


@pytest.mark.parametrize(
    ("maps", "boxes", "size", "message"),
    [
        (MAPS, BOXES[:2], (9, 12), r"one box .*\(2, 4\)"),
        (MAPS[0], BOXES, (9, 12), r"maps \[n, h, w\]"),
        (MAPS, BOXES, (9, 0), r"size is \(9, 0\)"),
    ],
    ids=["boxes", "maps", "size"],
)
def test_paste_of_other_shapes(maps, boxes, size, message):
    with pytest.raises(ValueError, match=message):
        paste_boxes(maps, boxes, size)


def slow_percentile_box(large, percentile):
    ys, xs = np.where(large >= np.percentile(large, percentile))
    return [ys.min(), xs.min(), ys.max() + 1, xs.max() + 1]


@pytest.mark.parametrize("percentile", [0.0, 50.0, 95.0, 99.9, 100.0])
def test_percentile_boxes_equal_numpys(percentile):
    maps = jnp.float32(RNG.normal(size=(6, 5, 4)))
    large = jax.image.resize(maps, (6, 21, 30), "cubic")
    expected = [slow_percentile_box(np.float64(one), percentile) for one in large]
    found = jax.jit(lambda m: percentile_boxes(m, (21, 30), percentile=percentile))(maps)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(3, 7), (21, 1), (10, 10)])
@pytest.mark.parametrize("percentile", [5.0, 10.0, 35.0, 95.0])
def test_percentile_of_whole_places_and_of_ties(size, percentile):
    """The pixel at a whole place counts, and ties count together."""
    maps = jnp.float32(RNG.permutation(np.prod(size)).reshape(1, *size) // 2)
    expected = [slow_percentile_box(np.float64(maps[0]), percentile)]
    np.testing.assert_array_equal(percentile_boxes(maps, size, percentile=percentile), expected)


def test_a_plateau_at_the_top_keeps_its_box():
    plateau = np.zeros((1, 10, 10), np.float32)
    plateau[0, 2:6, 3:9] = 0.1  # a quarter of all pixels
    np.testing.assert_array_equal(percentile_boxes(jnp.array(plateau), (10, 10)), [[2, 3, 6, 9]])


def test_boxes_of_a_published_percentile_cover_its_share():
    y, x = np.mgrid[:14, :14]
    bump = np.exp(-((y - 4) ** 2 + (x - 9) ** 2) / 8)[None]
    ((y0, x0, y1, x1),) = np.asarray(percentile_boxes(jnp.float32(bump), (448, 448)))
    assert 0.05 <= (y1 - y0) * (x1 - x0) / 448**2 < 0.08
    assert y0 < 4.5 * 32 < y1 and x0 < 9.5 * 32 < x1


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4, np.nan])
def test_a_map_without_a_place_is_the_whole_image(value):
    maps = jnp.full((1, 7, 7), value)
    np.testing.assert_array_equal(percentile_boxes(maps, (50, 60)), [[0, 0, 50, 60]])


def test_bad_percentile_and_size():
    with pytest.raises(ValueError, match=r"percentile is 101.*try 95"):
        percentile_boxes(jnp.zeros((1, 2, 2)), (4, 4), percentile=101)
    with pytest.raises(ValueError, match=r"image_size is \(0, 4\)"):
        percentile_boxes(jnp.zeros((1, 2, 2)), (0, 4))


def test_random_boxes_have_the_areas_of_published_ones():
    boxes = np.asarray(random_boxes(jax.random.key(0), 4000, (448, 448)))
    assert boxes.dtype == np.int32
    assert boxes.min() == 0 and boxes.max() == 448
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    area = height * width / 448**2
    np.testing.assert_allclose(area.min(), 0.053, atol=0.001)
    np.testing.assert_allclose(np.median(area), 0.10, atol=0.01)
    np.testing.assert_allclose((area < 0.07).mean(), 0.23, atol=0.05)
    np.testing.assert_allclose(np.percentile(height, [5, 95]), [91, 352], rtol=0.06)
    aspect = height / width
    assert 0.49 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.04
    # Where a box fits is where it may lie, to both ends.
    slack = 448 - height
    place = boxes[slack > 50, 0] / slack[slack > 50]
    assert place.min() < 0.01 and place.max() > 0.99
    np.testing.assert_allclose(place.mean(), 0.5, atol=0.02)


def test_random_boxes_of_one_area_and_of_one_pixel():
    boxes = random_boxes(jax.random.key(1), 50, (20, 30), area=(0.25, 0.25), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], [[10, 15]] * 50)
    whole = random_boxes(jax.random.key(1), 5, (20, 30), area=(1.0, 1.0))
    np.testing.assert_array_equal(whole, [[0, 0, 20, 30]] * 5)
    np.testing.assert_array_equal(random_boxes(jax.random.key(2), 5, (1, 1)), [[0, 0, 1, 1]] * 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"area": (0.0, 0.5)}, r"area is \(0.0, 0.5\).*<= 1"),
        ({"area": (0.5, 1.5)}, "area is"),
        ({"aspect": (2.0, 1.0)}, r"aspect is \(2.0, 1.0\).*\(0.5, 2.0\)"),
        ({"image_size": (0, 3)}, "image_size is"),
    ],
)
def test_bad_ranges(fields, message):
    with pytest.raises(ValueError, match=message):
        random_boxes(jax.random.key(0), 2, **{"image_size": (8, 8), **fields})

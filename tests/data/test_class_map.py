"""Which outputs stand for a class: the three rules, and the maps that come along."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from attnzoom_jax.data.class_map import COMMENT, COUNT, class_outputs
from attnzoom_jax.data.datasets.voc_folder import VOC_CLASSES
from tests.attribution.imported_networks import DATA

OUTPUTS = ("tench, Tinca tinca", "crane", "tabby, tabby cat", "Tiger_cat", "crane", "dog, hound")
MAPS = pathlib.Path(__file__).parents[2] / "configs" / "class_maps"


def lists(found):
    return [indices.tolist() for indices in found]


def save(folder, content):
    path = folder / "map.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_labels():
    assert lists(class_outputs("labels", ["x", "y"], ["a", "b"])) == [[0], [1]]
    with pytest.raises(ValueError, match=r"has 2 classes and the network 6 outputs; .* try the"):
        class_outputs("labels", ["x", "y"], OUTPUTS)


def test_names():
    names = ["Tabby Cat", "tiger cat", "cat", "crane", "HOUND", "tench, tinca Tinca", "tinca_tinca"]
    found = class_outputs("names", names, OUTPUTS)
    assert lists(found) == [[2], [3], [], [1, 4], [5], [0], [0]]
    assert lists(class_outputs("names", ["Tench,  Tinca tinca"], OUTPUTS)) == [[0]]
    assert all(indices.dtype == np.int64 for indices in found)
    with pytest.raises(ValueError, match=r"rule names: none of the classes \(x, y, .*'tench, Tinc"):
        class_outputs("names", ["x", "y"], OUTPUTS)


def test_a_whole_name_goes_before_a_synonym():
    outputs = ("Cardigan, Cardigan Welsh corgi", "cardigan", "jay, blue jay")
    assert lists(class_outputs("names", ["cardigan", "jay"], outputs)) == [[1], [2]]


def test_a_file(tmp_path):
    content = {"cat": [[2, 3], 2, "Tiger cat"], "person": [], "dog": ["hound", 0], "fork": [1]}
    path = save(tmp_path, {**content, COMMENT: "for people", COUNT: 6})
    assert lists(class_outputs(path, ["dog", "cat", "person"], OUTPUTS)) == [[0, 5], [2, 3], []]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"map.json cannot be read \(Expecting"),
        ("[1]", r"holds no \{class name: \[output, ...\]\}"),
        ({"cats": [2], "dog": [5]}, r"unknown class of the file 'cat'; did you mean 'cats'"),
        ({"cat": 2, "dog": []}, r"'cat' is 2; expected a list of outputs"),
        ({"cat": [6], "dog": []}, r"'cat': 6 is no output; expected an index from 0 to 5, \[first"),
        ({"cat": [-1], "dog": []}, r"'cat': -1 is no output"),
        ({"cat": [[3, 2]], "dog": []}, r"\[3, 2\] is no output"),
        ({"cat": [[2, 3, 4]], "dog": []}, r"\[2, 3, 4\] is no output"),
        ({"cat": [True], "dog": []}, r"True is no output"),
        ({"cat": [1.0], "dog": []}, r"1.0 is no output"),
        ({"cat": ["tiger"], "dog": []}, r"'cat': unknown output 'tiger'; did you mean 'tiger cat'"),
        ({"cat": ["crane"], "dog": []}, r"several outputs are called 'crane': \[1, 4\]; give an"),
        ({"cat": [], "dog": []}, r"none of the classes \(cat, dog"),
        ({"cat": [2], "dog": [], COUNT: 7}, r"is not for a network of 6 outputs; see its 'outputs"),
    ],
)
def test_files_that_are_wrong(tmp_path, content, message):
    path = save(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        class_outputs(path, ["cat", "dog"], OUTPUTS)
    assert "\n" not in str(error.value)


def test_rules_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"unknown rule for classes 'name'; did you mean 'names'"):
        class_outputs("name", ["cat"], OUTPUTS)
    with pytest.raises(ValueError, match=r"nowhere.json cannot be read \(.*No such file"):
        class_outputs(str(tmp_path / "nowhere.json"), ["cat"], OUTPUTS)


# The maps that come along


def read_map(name):
    content = json.loads((MAPS / name).read_text())
    return {key: value for key, value in content.items() if key not in (COMMENT, COUNT)}


COCO_WITHOUT = {
    *("person", "fire hydrant", "stop sign", "giraffe", "suitcase", "frisbee", "snowboard"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "wine glass", "fork"),
    *("carrot", "donut", "cake", "oven", "book", "scissors", "toothbrush"),
}


@pytest.mark.parametrize(
    "name, count, without",
    [("coco_to_imagenet.json", 80, COCO_WITHOUT), ("voc_to_imagenet.json", 20, {"person"})],
)
def test_maps_to_imagenet(name, count, without):
    names = list(read_map(name))
    assert len(names) == count
    outputs = [f"output {index}" for index in range(1000)]
    found = dict(zip(names, class_outputs(str(MAPS / name), names, outputs), strict=True))
    assert {name for name, indices in found.items() if not len(indices)} == without
    everything = np.concatenate(list(found.values()))
    assert len(set(everything)) == len(everything)  # an output stands for one class
    assert [len(found[animal]) for animal in ("bird", "cat", "dog")] == [59, 5, 118]
    with pytest.raises(ValueError, match="is not for a network of 1001 outputs"):
        class_outputs(str(MAPS / name), names, ["background", *outputs])


def test_the_maps_agree():
    same = {"aeroplane": "airplane", "motorbike": "motorcycle", "diningtable": "dining table"}
    same |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
    coco, voc = read_map("coco_to_imagenet.json"), read_map("voc_to_imagenet.json")
    assert {name: coco[same.get(name, name)] for name in voc} == voc
    assert tuple(voc) == VOC_CLASSES
    features: Any = tfds.builder_cls("voc")(data_dir="/nowhere").info.features
    assert list(voc) == features["objects"].feature["label"].names


REAL = DATA / "weights_imagenet" / "imagenet_labels.txt"


@pytest.mark.data
@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} in {DATA} (ATTNZOOM_DATA)")
def test_the_names_of_imagenet():
    outputs = REAL.read_text().splitlines()[1:]
    assert len(outputs) == 1000
    coco = read_map("coco_to_imagenet.json")
    found = class_outputs(str(MAPS / "coco_to_imagenet.json"), list(coco), outputs)
    mapped = dict(zip(coco, found, strict=True))
    words = {
        **{"dog": ("Chihuahua", "Mexican hairless"), "cat": ("tabby", "Egyptian cat")},
        **{"bear": ("brown bear", "sloth bear"), "bird": ("cock", "albatross")},
    }
    for name, (first, last) in words.items():
        assert outputs[mapped[name][0]].startswith(first)
        assert outputs[mapped[name][-1]].startswith(last)
    # What has the class's own name among its words is in the map: but a kite is a bird there.
    by_name = class_outputs("names", list(coco), outputs)
    for name, same in zip(coco, by_name, strict=True):
        if name != "kite":
            assert set(same) <= set(mapped[name]), name
    assert [outputs[i] for i in by_name[list(coco).index("kite")]] == ["kite"]


def test_a_star_stands_for_every_class_that_is_not_named(tmp_path):
    file = tmp_path / "map.json"
    file.write_text('{"*": [[1, 2]], "dog": ["c"]}')
    found = class_outputs(str(file), ("owl", "dog", "jay"), ("a", "b", "c"))
    assert [indices.tolist() for indices in found] == [[1, 2], [2], [1, 2]]

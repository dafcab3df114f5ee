import pytest

from attnzoom_jax.errors import unknown_name

PATHS = [f"backbone/stage{i}/block1/conv1" for i in (1, 2)] + ["backbone/stage1", "head"]


@pytest.mark.parametrize(
    ("given", "known", "message"),
    [
        ("resnet5", ["resnet50", "vgg16"], "did you mean 'resnet50'? There is: resnet50, vgg16"),
        ("ResNet50", ["resnet50"], "did you mean 'resnet50'?"),
        ("stage1", PATHS, "did you mean 'backbone/stage1' or 'backbone/stage1/block1/conv1'?"),
        ("zzz", ["a", "b"], "unknown thing 'zzz'. There is: a, b"),
        ("zzz", [], "There is: nothing"),
        ("", ["a"], "unknown thing ''. There is: a"),
        (3, ["a"], "unknown thing 3. There is: a"),
        ("x5", [f"name{i}" for i in range(40)], "name23, ..."),
    ],
)
def test_the_message_names_what_is_near_and_what_there_is(given, known, message):
    error = unknown_name("thing", given, known)
    assert isinstance(error, ValueError)
    assert message in str(error)

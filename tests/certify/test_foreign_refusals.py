"""What the scripts refuse or warn of in a classifier that is a function of the user's, before anything is written."""

import json

import pytest
import torch
from conftest import DIGITS, RUN_FLAGS

from spacte.precision import select_precision


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("random", "gives two different answers for the same images: switch off what is random in it"),
        ("train_mode", "depends on the other images of its batch: take BatchNorm out of train mode"),
        ("company", "depends on the other images of its batch"),
        ("probabilities", "the 3 heads return probabilities, and what is summed over heads is logits"),
        ("classes", "returned int64 [100]: it must return logits, floating point, [N, K] or [L, N, K]"),
        ("no_tensor", "returned a dict: it must return logits"),
        ("not_finite", "logits are not finite on noised images"),
        ("too_few", "the classifier knows 7 classes, the data have 10"),
        ("other_images", "fails on images [100, 1, 8, 8]: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("one_image", "returned float32 [1, 10] for 100 images"),
        ("nothing", "nothing returned a NoneType: it must return a module or a callable"),
        ("missing", "FileNotFoundError: [Errno 2] No such file or directory: 'weights.pth' (my_models.py, line"),
        ("ends", "--classifier my_models.py:ends: SystemExit: 2 (my_models.py, line"),
        ("other", "'my_models.py' has no function 'other'; it has net, build, three"),
        ("builtin", "--classifier my_models.py:builtin: 'builtin' is not a Python function"),
    ],
)
def test_the_contract_is_checked_before_anything_is_written(script, models, tmp_path, function, message):
    flags = ("--classifier", f"my_models.py:{function}", *DIGITS, *RUN_FLAGS)
    code, _, err = script("certify_mhead.py", *flags)
    errors = [line for line in err.splitlines() if "warning: no parameters" not in line]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert not (tmp_path / "logs").exists()


@pytest.fixture
def as_it_was():
    """torch's settings, which are the whole process'."""
    before = torch.backends.cudnn.allow_tf32
    yield
    select_precision("fp32", torch.device("cpu"))
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before, False


CHANGED = [
    (("old_name",), "float32_matmul_precision", "high", "highest"),
    (("new_name",), "float32_matmul_precision", "tf32 on CUDA, ieee on CPU", "highest"),
    (("general",), "cudnn_allow_tf32", "tf32 in convolutions, tf32 in recurrent layers", "False"),
    (("settings", "old=medium"), "float32_matmul_precision", "medium", "highest"),
    (("settings", "new=cudnn tf32"), "cudnn_allow_tf32", "tf32 in convolutions, none in recurrent layers", "False"),
    (("settings", "new=mkldnn bf16"), "mkldnn_conv_fp32_precision", "bf16", "none"),
    (("settings", "benchmark=True"), "cudnn_benchmark", True, "False"),
]


@pytest.mark.parametrize(("function", "name", "value", "before"), CHANGED, ids=[str(case[0]) for case in CHANGED])
def test_settings_of_the_arithmetic_that_a_classifier_changes_are_warned_of(
    script, models, tmp_path, as_it_was, function, name, value, before
):
    """Also where torch's older settings, at odds with its newer ones, cannot be read; nobody's are left to the next."""
    arguments = ("--classifier_args", *function[1:]) if function[1:] else ()
    flags = (*DIGITS, "--skip", 120, *RUN_FLAGS, *arguments)
    code, _, err = script("certify_mhead.py", "--classifier", f"my_models.py:{function[0]}", *flags)
    (line,) = [line for line in err.splitlines() if "arithmetic" in line]
    start, end = line.split(f"({name} {value}, not {before}")
    assert code == 0 and start == "certify_mhead.py: warning: the classifier sets torch's arithmetic "
    assert end.endswith("): the log's JSON says so under arithmetic, beside its precision fp32")
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["config"]["arithmetic"][name] == value
    code, _, err = script("certify_mhead.py", "--classifier", "my_models.py:build", *flags[: -len(arguments) or None])
    assert code == 0 and "arithmetic" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classifier", "my_models"), "it must be FILE.py:function"),
        (("--classifier", "no.py:build"), "there is no file 'no.py'"),
        (("--classifier", "broken.py:build"), "SyntaxError: '(' was never closed (broken.py, line 1)"),
        (
            ("--classifier_args", "depth=3"),
            "unexpected keyword argument 'depth'; --classifier_args must fit build(scale",
        ),
        (("--classifier_args", "scale"), "each must be key=value"),
        (("--dataset", "cifar"), "unknown data set 'cifar'"),
        (("--arch", "R8"), "--arch is about a checkpoint's network"),
        (("--normalize", "none"), "--normalize is about a checkpoint's network"),
        (("--head", 1), "the classifier's heads are 0..0"),
        (("--model_path", "a.pth"), "not allowed with argument"),
    ],
)
def test_wrong_flags(script, models, tmp_path, flags, message):
    (tmp_path / "broken.py").write_text("x = (")
    command = ("--classifier", "my_models.py:build", *DIGITS, *RUN_FLAGS, *flags)
    code, _, err = script("certify_mhead.py", *command)
    assert code == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("given", "message"), [(DIGITS[2:], "its dataset: give"), (DIGITS[:2], "its noise_sd: give")])
def test_a_function_does_not_say_data_and_noise(script, models, given, message):
    code, _, err = script("certify_mhead.py", "--classifier", "my_models.py:build", *given, *RUN_FLAGS)
    assert code == 2 and message in err

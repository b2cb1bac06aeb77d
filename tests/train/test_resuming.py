"""Training runs that are resumed: to the same end, by the same run, or not at all."""

import pandas as pd
import pytest
import torch
from conftest import TINY, same

from spacte.model import checkpoint_file

TAIL = "digits/R8/noise-0.50"


@pytest.mark.parametrize("defence", ["0Gaussian", "5CATRS", "6ACRWeakness"])
def test_a_resumed_run_ends_as_if_never_interrupted(script, tmp_path, monkeypatch, own_flags, defence):
    """ACR-weakness resumes in an epoch that goes by the weights of an earlier one."""
    train, flags = f"{defence}/train.py", (*TINY, *own_flags(defence), "--train_images", 200, "--num_heads", 2)
    flags += ("--epochs", 4, "--save_freq", 2)
    assert script(train, *flags, "--save_dir", "whole", "--logs_dir", "whole-logs")[0] == 0

    saves = []

    def killed_after_two(path, contents, save=checkpoint_file.save):
        if len(saves) == 2:
            raise KeyboardInterrupt
        saves.append(save(path, contents))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "save", killed_after_two)
        code, _, err = script(train, *flags)
        assert code == 130 and "interrupted" in err
    assert script(train, *flags, "--resume")[0] == 0

    (resumed,), (whole,) = ((tmp_path / folder).rglob("epoch4.pth") for folder in ("save", "whole"))
    resumed, whole = (torch.load(path, weights_only=True) for path in (resumed, whole))
    for name in ("state_dict", "optimizer", "scheduler", "epoch", "rng", "data", "objective"):
        assert same(resumed.get(name), whole.get(name)), name
    logs = [next((tmp_path / folder).rglob("*-train.log")) for folder in ("logs", "whole-logs")]
    tables = [pd.read_csv(log, sep="\t").drop(columns="images_per_second") for log in logs]
    pd.testing.assert_frame_equal(*tables)

    code, out, _ = script(train, *flags, "--resume")
    assert code == 0 and "nothing is left to do" in out


def test_resume_passes_over_a_damaged_checkpoint(script, tmp_path):
    flags = (*TINY, "--num_heads", 2, "--epochs", 2)
    assert script("0Gaussian/train.py", *flags)[0] == 0
    (last,) = (tmp_path / "save").rglob("epoch2.pth")
    before = torch.load(last, weights_only=True)["state_dict"]
    last.write_bytes(last.read_bytes()[:1000])
    code, out, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 0 and "passed over" in out + err
    assert same(torch.load(last, weights_only=True)["state_dict"], before)


def test_a_run_is_neither_overwritten_nor_mixed(script, trained):
    flags = (*TINY, "--num_heads", 2, "--epochs", 1)
    code, _, err = script("0Gaussian/train.py", *flags)
    assert code == 2 and "already holds epoch1.pth: give --resume" in err and err.count("\n") == 1
    code, _, err = script("0Gaussian/train.py", *flags, "--resume", "--lr_init", 0.2)
    assert code == 2 and "--lr_init 0.2 contradicts" in err and "lr_init 0.1" in err
    torch.save(torch.load(trained, weights_only=True) | {"data_sha256": "of other images"}, trained)
    code, _, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 2 and "--data_dir differ from those that the run was started on" in err


def test_a_run_of_an_older_name_is_resumed_where_it_lies(script, tmp_path):
    """Its log keeps its columns; the weights are those of a run that was never interrupted."""
    flags = (*TINY, "--train_images", 200, "--num_heads", 1, "--epochs", 2, "--save_freq", 1)
    assert script("0Gaussian/train.py", *flags)[0] == 0
    whole, older = tmp_path / "save" / TAIL / "h-1-m-2-images-200", "h-1-eps-0.8-m-2-lbdlast-1.2-images-200"
    weights = torch.load(whole / "epoch2.pth", weights_only=True)["state_dict"]
    assert script("0Gaussian/train.py", *flags, "--resume", "--lbdlast", 0.3, "--eps", 0)[1].endswith("left to do\n")

    begun = torch.load(whole / "epoch1.pth", weights_only=True)
    lines = [line.split("\t") for line in begun["log"].splitlines()]
    begun["log"] = "".join(
        "\t".join([*line[:2], pace, *line[2:]]) + "\n" for line, pace in zip(lines, ("lambda", "2.3"), strict=True)
    )
    begun["run"] = older
    whole.rename(whole.with_name(older))
    (whole.with_name(older) / "epoch2.pth").unlink()
    torch.save(begun, whole.with_name(older) / "epoch1.pth")
    assert script("0Gaussian/train.py", *flags)[0] == 2, "without --resume"
    code, _, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 0 and not whole.exists(), err
    contents = torch.load(whole.with_name(older) / "epoch2.pth", weights_only=True)
    assert same(contents["state_dict"], weights) and contents["run"] == older
    log = pd.read_csv(tmp_path / "logs" / TAIL / "train" / f"{older}-train.log", sep="\t")
    assert (
        log["lambda"].isna().tolist() == [False, True] and log["epoch"].tolist() == [1, 2] and log["loss"].notna().all()
    )


def test_a_run_that_other_code_resumes_says_so(script, tmp_path):
    """From there on the loss may be another one; the same code says nothing, nor does a run that is finished."""
    flags = (*TINY, "--num_heads", 1, "--epochs", 2, "--resume")
    assert script("0Gaussian/train.py", *flags)[0] == 0
    (first,), (last,) = ((tmp_path / "save").rglob(f"epoch{epoch}.pth") for epoch in (1, 2))
    last.unlink()
    assert "the code has changed" not in script("0Gaussian/train.py", *flags)[2]
    torch.save(torch.load(first, weights_only=True) | {"source_sha256": "e" * 64}, first)
    assert "the code has changed" not in script("0Gaussian/train.py", *flags)[2]
    last.unlink()
    err = script("0Gaussian/train.py", *flags)[2]
    assert "the code has changed since this run was interrupted (source_sha256 eeeeeeee up to epoch 1, " in err


def test_a_run_is_not_resumed_by_another_defence(script, tmp_path):
    """Gaussian's and SmoothMix's runs have one name."""
    flags = (*TINY, "--num_heads", 1, "--epochs", 1, "--lbdlast", 1.0)
    assert script("2SmoothMix/train.py", *flags)[0] == 0
    code, _, err = script("0Gaussian/train.py", *flags, "--resume")
    assert code == 2 and "was trained by SmoothMix, not by Gaussian" in err


def test_a_setting_that_a_checkpoint_does_not_know_had_its_default(script, trained):
    """As an older program left it: a run goes on with the default, and not with another value."""
    contents = torch.load(trained, weights_only=True)
    for name in ("paced_by", "train_images"):
        del contents["args"][name]
    del contents["data_sha256"], contents["commit"]
    torch.save(contents, trained)
    flags = (*TINY, "--num_heads", 2, "--resume")
    code, out, err = script("0Gaussian/train.py", *flags, "--epochs", 1)
    assert code == 0 and "nothing is left to do" in out, err
    contents["args"]["epochs"] = 2
    contents["run"] += "-no-teaching"
    other = trained.parent.with_name(trained.parent.name + "-no-teaching")
    other.mkdir()
    torch.save(contents, other / "epoch1.pth")
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--no_teaching")
    assert code == 2 and "--paced_by none contradicts" in err and "paced_by neighbour" in err
    contents["args"]["no_teaching"] = True  # as it was called
    torch.save(contents, other / "epoch1.pth")
    code, _, err = script("0Gaussian/train.py", *flags, "--epochs", 2, "--no_teaching")
    assert code == 0, err

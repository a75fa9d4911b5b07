"""timm's training script with two lines more: its own task, optimizer groups, average, saver and resume."""

import argparse

import pytest
import timm
import torch
from held import off_target
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

from specscale import NormScaler, apply_norm_scaling
from specscale.__main__ import main

EPOCHS = 3


def make():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4, img_size=32)


def optimizer_of(model, opt):
    return create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.05, layer_decay=0.75)


def run(folder, opt, norm, epochs=EPOCHS, resume=None):
    """The order of timm's `train.py`; the two lines are those behind `create_optimizer_v2`."""
    folder.mkdir(exist_ok=True)
    task = ClassificationTask(make(), nn.CrossEntropyLoss(), verbose=False)
    model = task.get_trainable_module()
    optimizer = optimizer_of(model, opt)
    scaling = apply_norm_scaling(model, norm)
    scaling.attach(optimizer)
    start = 0
    if resume is not None:
        start = resume_task_checkpoint(task, str(resume), optimizer=optimizer, log_info=False)
    task.setup_ema(decay=0.5)
    if resume is not None:
        load_task_ema_checkpoint(task, str(resume))
    args = argparse.Namespace(model="test_vit")
    folders = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
    saver = CheckpointSaver(model=model, optimizer=optimizer, args=args, task=task, **folders)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, warmup_epochs=0)
    if start:
        schedule.step(start)
    for epoch in range(start, epochs):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            images = torch.randn(4, 3, 32, 32, generator=generator)
            labels = torch.randint(4, (4,), generator=generator)
            optimizer.zero_grad()
            task(images, labels)["loss"].backward()
            optimizer.step()
            task.update_ema()
        saver.save_checkpoint(epoch, metric=epoch)
        schedule.step(epoch + 1)
    return model, optimizer, scaling, task.get_trainable_module(ema=True)


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path)


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("opt", "norm"), [("adamw", "frobenius"), pytest.param("muon", "spectral", marks=pytest.mark.slow)]
)
def test_timms_script_trains_resumes_and_averages_and_plain_timm_reads_its_file(opt, norm, tmp_path, capsys):
    _, optimizer, scaling, average = run(tmp_path / "whole", opt, norm)
    assert max(map(off_target, scaling.weights)) < 1e-3
    # The average is not projected, unless that is asked for.
    held = NormScaler.of(average)
    assert max(map(off_target, held.weights)) > 1e-5
    scaling.project(average)
    assert max(map(off_target, held.weights)) < 1e-5

    # The groups, and the order of the optimizer's state, are those of plain timm.
    plain_groups = optimizer_of(make(), opt).param_groups
    for group, plain_group in zip(optimizer.param_groups, plain_groups, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in plain_group["params"]]
        assert (group["weight_decay"], group["lr_scale"]) == (plain_group["weight_decay"], plain_group["lr_scale"])

    run(tmp_path / "begun", opt, norm, epochs=2)
    run(tmp_path / "resumed", opt, norm, resume=tmp_path / "begun" / "last.pth.tar")
    expected = load(tmp_path / "whole" / "last.pth.tar")
    found = load(tmp_path / "resumed" / "last.pth.tar")
    for part in ("state_dict", "state_dict_ema", "optimizer", "epoch"):
        assert_equal(found[part], expected[part])

    best = tmp_path / "resumed" / "model_best.pth.tar"
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model("test_vit", num_classes=4, img_size=32, checkpoint_path=str(best))
    assert main(["plain", str(best), str(best)]) == 0
    assert "state_dict_ema: 26 weights made plain" in capsys.readouterr().out
    for use_ema, part in ((True, "state_dict_ema"), (False, "state_dict")):
        plain = make()
        timm.models.load_checkpoint(plain, str(best), use_ema=use_ema)
        key = "blocks.0.attn.qkv"
        assert torch.equal(plain.state_dict()[f"{key}.weight"], found[part][f"{key}.parametrizations.weight.original"])
        assert list(plain.state_dict()) == list(load(best)[part])

"""Lightning, transformers and accelerate: their real training loops hold the norms, log them and resume."""

import contextlib
import csv
import os

import accelerate
import lightning.pytorch as pl
import pytest
import torch
import transformers
from held import off_target
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from specscale import NormScaler, apply_norm_scaling
from specscale.integrations.lightning import NormScalingCallback as LightningCallback
from specscale.integrations.transformers import NormScalingCallback as TrainerCallback

NORMS = ("frobenius", "spectral")


@contextlib.contextmanager
def watch(model):
    """Look at every weight after each optimizer step that moved one; yields the list of how far off they were."""
    weights = NormScaler.of(model).weights
    errors, before = [], [weight.parameter.detach().clone() for weight in weights]

    def look(*_):
        after = [weight.parameter.detach().clone() for weight in weights]
        if not all(map(torch.equal, before, after)):
            errors.append(max(map(off_target, weights)))
        before[:] = after

    # Global hooks come after the optimizer's own.
    handle = register_optimizer_step_post_hook(look)
    try:
        yield errors
    finally:
        handle.remove()


def hooks(optimizer):
    return len(optimizer._optimizer_step_post_hooks)


def spoil(model):
    """Other weights and targets, for a checkpoint to put right."""
    for weight in NormScaler.of(model).weights:
        nn.init.normal_(weight.parameter)
        weight.scaling.target.fill_(9.0)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))


def batches(count):
    x = torch.randn(4 * count, 12, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=4)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_the_watch_sees_a_step_without_scaling():
    for norm in NORMS:
        apply_norm_scaling(model := mlp(), norm, init="orthogonal")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        loss(model, next(iter(batches(1)))).backward()
        with watch(model) as errors:
            optimizer.step()
        assert errors[0] > 1e-3


class Module(pl.LightningModule):
    """Scaled where it is built, so that a checkpoint finds it so."""

    def __init__(self, norm="spectral"):
        super().__init__()
        self.net = mlp()
        if norm is not None:
            apply_norm_scaling(self.net, norm, init="orthogonal", solver="svd")

    def training_step(self, batch, _):
        self.log("loss", value := loss(self.net, batch))
        return value

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Kept(Module):
    """Brings the same optimizer to every fit."""

    def __init__(self):
        super().__init__()
        self.optimizer = super().configure_optimizers()

    def configure_optimizers(self):
        return self.optimizer


class Alternating(Module):
    """Two optimizers by hand, the second in every third batch, and one that owns no scaled weight."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.extra = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        first, second, third = self.optimizers()
        for optimizer in (first, second) if index % 3 == 0 else (first,):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
        self.manual_backward(self.extra.square())
        third.step()

    def configure_optimizers(self):
        parts = (self.net[0].parameters(), self.net[2:].parameters(), [self.extra])
        return [torch.optim.SGD(part, lr=0.1) for part in parts]


def lightning_trainer(folder, *callbacks, **options):
    options = {"max_epochs": 1, "log_every_n_steps": 2, "logger": CSVLogger(folder), "accelerator": "cpu"} | options
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        options["enable_checkpointing"] = False
    return pl.Trainer(callbacks=list(callbacks), **options)


def logged(trainer, name):
    """The CSV logger's rows that hold a metric."""
    with open(os.path.join(trainer.logger.log_dir, "metrics.csv")) as file:
        return [row for row in csv.DictReader(file) if row.get(name)]


def logged_steps(trainer, name):
    return [int(row["step"]) for row in logged(trainer, name)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_lightning_holds_the_norms_and_logs_them(norm, accumulate, tmp_path):
    module, callback = Module(norm), LightningCallback()
    trainer = lightning_trainer(tmp_path, callback, accumulate_grad_batches=accumulate)
    with watch(module) as errors:
        trainer.fit(module, batches(6 * accumulate))
    assert len(errors) == 6
    assert max(errors) <= 1e-4
    assert logged_steps(trainer, "norm/net.0") == logged_steps(trainer, "loss") == [1, 3, 5]
    metrics, last = callback.scaling.metrics(), logged(trainer, "norm/net.0")[-1]
    assert {name: float(last[name]) for name in metrics} == pytest.approx(metrics)


def test_lightning_attaches_to_every_optimizer_that_owns_a_weight(tmp_path):
    module = Alternating()
    trainer = lightning_trainer(tmp_path, LightningCallback(), log_every_n_steps=5)
    with watch(module) as errors:
        trainer.fit(module, batches(9))
    assert [hooks(optimizer) for optimizer in trainer.optimizers] == [1, 1, 0]
    assert len(errors) == 9 + 3
    assert max(errors) <= 1e-4
    assert logged_steps(trainer, "norm/net.0") == logged_steps(trainer, "loss") == [4]


def test_lightning_fits_twice(tmp_path):
    module, callback = Kept(), LightningCallback()
    with watch(module) as errors:
        for _ in range(2):
            lightning_trainer(tmp_path, callback, logger=False).fit(module, batches(3))
    assert len(errors) == 6
    assert max(errors) <= 1e-4
    assert hooks(module.optimizer) == 1
    # Then another model, and the same trainer twice.
    trainer, other = lightning_trainer(tmp_path, callback), Module("frobenius")
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        with watch(other) as errors:
            trainer.fit(other, batches(4))
        assert len(errors) == 4
        assert max(errors) <= 1e-4
    assert logged_steps(trainer, "norm/net.0") == [1, 3, 5, 7]


def test_lightning_takes_a_handle(tmp_path):
    module = Kept()
    scaling = NormScaler.of(module).attach(module.optimizer)
    callback = LightningCallback(scaling)
    lightning_trainer(tmp_path, callback, logger=False).fit(module, batches(1))
    assert callback.scaling is scaling
    assert hooks(module.optimizer) == 1, "attached by hand before"


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_lightning_resumes_to_the_same_weights(tmp_path):
    whole, resumed = Module(), Module()
    first, second = (
        lightning_trainer(
            tmp_path, LightningCallback(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=2
        )
        for _ in range(2)
    )
    first.fit(whole, batches(5))
    spoil(resumed)
    with watch(resumed) as errors:
        second.fit(resumed, batches(5), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(errors) == 5
    assert max(errors) <= 1e-4
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert logged_steps(second, "norm/net.0") == [5, 7, 9]


def test_lightning_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"NormScaler.of: Module has no scaled weight"):
        lightning_trainer(tmp_path, LightningCallback()).fit(Module(None), batches(2))
    foreign = Module()
    foreign.configure_optimizers = lambda: torch.optim.SGD(mlp().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"none of the trainer's optimizers \(SGD\) owns a scaled weight; build one"):
        lightning_trainer(tmp_path, LightningCallback()).fit(foreign, batches(2))


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=8)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    tokens = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **tokens))


def hf_trainer(model, folder, scaling=None, **options):
    options = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2} | options
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2, **options
    )
    ids = torch.randint(50, (32, 8), generator=torch.Generator().manual_seed(1))
    causal = isinstance(model, transformers.GPT2LMHeadModel)
    data = [{"input_ids": row, "labels": row if causal else row[0] % 2} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.add_callback(TrainerCallback(trainer, scaling))
    return trainer


def callback_of(trainer):
    (found,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, TrainerCallback)]
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_the_trainer_holds_the_norms_and_logs_them(norm, accumulate, tmp_path):
    apply_norm_scaling(model := bert(), norm, init="orthogonal", solver="svd")
    trainer = hf_trainer(model, tmp_path, gradient_accumulation_steps=accumulate)
    with watch(model) as errors:
        trainer.train()
    assert len(errors) == 4
    assert max(errors) <= 1e-4
    metrics = callback_of(trainer).scaling.metrics()
    name = next(iter(metrics))
    history = trainer.state.log_history
    rows = [row for row in history if name in row]
    assert [row["step"] for row in rows] == [row["step"] for row in history if "loss" in row] == [2, 4]
    assert {name: rows[-1][name] for name in metrics} == metrics


def test_the_trainer_trains_twice(tmp_path):
    apply_norm_scaling(model := bert(), init="orthogonal", solver="svd")
    trainer = hf_trainer(model, tmp_path, save_strategy="no")
    with watch(model) as errors:
        trainer.train()
        kept = trainer.optimizer
        trainer.train()
    assert trainer.optimizer is kept, "the trainer brings the same optimizer back"
    assert hooks(kept.optimizer) == 1
    assert len(errors) == 8
    assert max(errors) <= 1e-4


def test_the_trainer_resumes_to_the_same_weights(tmp_path):
    """A causal model: transformers' own `Conv1D`, and a head that is tied to the embedding and so left alone."""
    whole, resumed = gpt2(), gpt2()
    for model in (whole, resumed):
        apply_norm_scaling(model, init="orthogonal", solver="svd", exclude="lm_head")
    spoil(resumed)
    hf_trainer(whole, tmp_path, save_steps=2).train()
    trainer = hf_trainer(resumed, tmp_path, save_steps=2)
    with watch(resumed) as errors:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(errors) == 2
    assert max(errors) <= 1e-4
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_trained_model_is_saved_plain(tmp_path):
    scaling = apply_norm_scaling(model := gpt2(), init="orthogonal")
    trainer = hf_trainer(model, tmp_path, scaling, max_steps=1, save_strategy="no")
    trainer.train()
    assert callback_of(trainer).scaling is scaling
    model.save_pretrained(tmp_path / "plain", state_dict=scaling.plain_state_dict())
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)


def test_the_trainer_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"NormScaler.of: BertForSequenceClassification has no scaled weight"):
        hf_trainer(bert(), tmp_path).train()
    apply_norm_scaling(model := gpt2())
    with pytest.raises(ValueError, match=r"cannot save 'lm_head' under scaling, as .* exclude=\['lm_head'\]\)"):
        hf_trainer(model, tmp_path).train()
    apply_norm_scaling(model := bert())
    trainer = hf_trainer(model, tmp_path)
    trainer.optimizer = torch.optim.SGD(bert().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="attach: SGD owns none of the scaled weights"):
        trainer.train()


@pytest.mark.parametrize("norm", NORMS)
def test_accelerate_steps_the_attached_optimizer(norm, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    scaling = apply_norm_scaling(model := mlp(), norm, init="orthogonal", solver="svd")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scaling.attach(optimizer)
    model, prepared, data = accelerator.prepare(model, optimizer, batches(12))

    def epoch():
        with watch(model) as errors:
            for batch in data:
                with accelerator.accumulate(model):
                    accelerator.backward(loss(model, batch))
                    prepared.step()
                    prepared.zero_grad()
        assert len(errors) == 4
        assert max(errors) <= 1e-4
        return {name: value.clone() for name, value in model.state_dict().items()}

    assert hooks(optimizer) == 1
    accelerator.save_state(tmp_path)
    ends = [epoch()]
    accelerator.load_state(tmp_path)
    ends.append(epoch())
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


def test_accelerate_names_the_optimizer_to_attach_to():
    scaling = apply_norm_scaling(model := mlp())
    wrapped = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"AcceleratedOptimizer never calls step hooks;.* attach to the"):
        scaling.attach(wrapped)

"""What an error looks like: the docs quote each refusal as it is."""

import pickle
from pathlib import Path

import pytest
import torch
from timm.optim import Lookahead
from torch import nn
from torch.nn.utils import parametrize, prune

from specscale import (
    LayerRule,
    MatrixView,
    NormScaler,
    apply_norm_scaling,
    orthogonal_init_,
    plain_state_dict,
    remove_norm_scaling,
    singular_values,
    spectral_norms,
)

PAGES = sorted(Path(__file__).parent.parent.glob("docs/errors*.md"))
TEXT = " ".join(" ".join(page.read_text().split()) for page in PAGES)


def net(**options):
    """Layers called `encoder.0`, `encoder.2` and `head`."""
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model.head = nn.Linear(8, 3, **options)
    return model


def broken():
    model = net()
    model.head.weight.data[0, 0] = torch.nan
    return model


def pruned():
    model = net()
    prune.l1_unstructured(model.head, "weight", 0.5)
    return model


def tied_by_memory():
    model = net()
    model.encoder[2].weight.data = model.encoder[0].weight.data
    return model


def scaled():
    model = net()
    return model, apply_norm_scaling(model)


def attach(wrap, parameters=None):
    model, scaling = scaled()
    scaling.attach(wrap(torch.optim.SGD(parameters or model.parameters(), lr=0.1)))


def attach_twice():
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer).attach(optimizer)


def step_from_bad_weights():
    model, scaling = scaled()
    model.head.weight.data.fill_(torch.inf)
    scaling.step()


def step_after_removal():
    _, scaling = scaled()
    scaling.remove()
    scaling.step()


def load_another_norm():
    apply_norm_scaling(source := net(), "frobenius")
    scaled()[0].load_state_dict(source.state_dict())


def load_the_plain_order():
    plain = net()
    saved = torch.optim.Adam(plain.parameters())
    sum(parameter.sum() for parameter in plain.parameters()).backward()
    saved.step()
    model, scaling = scaled()
    optimizer = torch.optim.Adam(model.parameters())
    scaling.attach(optimizer)
    optimizer.load_state_dict(saved.state_dict())


def step_inside_plain():
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    with scaling.plain():
        optimizer.step()


def assign():
    scaled()[0].head.weight = nn.Parameter(torch.ones(3, 8))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def save_plain_with_another_on_top():
    model, scaling = scaled()
    parametrize.register_parametrization(model.head, "weight", Doubled())
    scaling.plain_state_dict()


def save_plain_from_a_state_dict_with_another_on_top():
    model, _ = scaled()
    parametrize.register_parametrization(model.head, "weight", Doubled())
    plain_state_dict(model.state_dict())


def attach_on_meta():
    model = net(device="meta")
    apply_norm_scaling(model, target=1.0).attach(torch.optim.SGD(model.parameters(), lr=0.1))


def step_in_memory_of_nan():
    model = net(device="meta")
    scaling = apply_norm_scaling(model, target=1.0)
    model.head.to_empty(device="cpu")
    nn.init.constant_(model.head.weight, torch.nan)
    scaling.step()


CASES = {
    "no module": lambda: apply_norm_scaling([net()]),
    "unknown norm": lambda: apply_norm_scaling(net(), "nuclear"),
    "unknown solver": lambda: apply_norm_scaling(net(), solver="qr"),
    "unknown target": lambda: apply_norm_scaling(net(), target="final"),
    "negative target": lambda: apply_norm_scaling(net(), target=-1.0),
    "two numbers for one matrix": lambda: apply_norm_scaling(net(), target={"head": lambda n, m: [1.0, 2.0], "*": 1.0}),
    "a weight without a pattern": lambda: apply_norm_scaling(net(), target={"encoder": 1.0}),
    "a pattern without a weight": lambda: apply_norm_scaling(net(), target={"heads": 1.0, "*": 2.0}),
    "a pattern that comes too late": lambda: apply_norm_scaling(net(), target={"*": 1.0, "head": 2.0}),
    "a number for a schedule": lambda: apply_norm_scaling(net(), schedule=0.5),
    "a negative factor": lambda: apply_norm_scaling(net(), schedule=lambda step: -1.0),
    "a factor that is no number": lambda: apply_norm_scaling(
        net(), schedule=lambda step: torch.nan if step else 1.0
    ).step(),
    "features without an input": lambda: apply_norm_scaling(net(), target="features"),
    "pattern": lambda: apply_norm_scaling(net(), exclude="heads"),
    "nothing left": lambda: apply_norm_scaling(net(), exclude="*"),
    "rule for a tensor": lambda: apply_norm_scaling(net(), rules=LayerRule(nn.Linear, {"kernel": MatrixView("o i")})),
    "rule for a shape": lambda: apply_norm_scaling(net(), rules=LayerRule(nn.Linear, {"weight": MatrixView("o i w")})),
    "view": lambda: MatrixView("o i", count=2),
    "scaled already": lambda: apply_norm_scaling(scaled()[0]),
    "computed": lambda: apply_norm_scaling(pruned()),
    "same memory": lambda: apply_norm_scaling(tied_by_memory()),
    "lazy": lambda: apply_norm_scaling(nn.Sequential(nn.LazyLinear(3))),
    "meta": lambda: apply_norm_scaling(net(device="meta")),
    "an init on meta": lambda: apply_norm_scaling(net(device="meta"), init="orthogonal"),
    "an init of its own on meta": lambda: orthogonal_init_(net(device="meta")),
    "an optimizer on meta": attach_on_meta,
    "a step on meta": lambda: apply_norm_scaling(net(device="meta"), target=1.0).step(),
    "memory without values": step_in_memory_of_nan,
    "not finite": lambda: apply_norm_scaling(broken()),
    "another norm's checkpoint": load_another_norm,
    "another parametrization": save_plain_with_another_on_top,
    "another parametrization in a state dict": save_plain_from_a_state_dict_with_another_on_top,
    "no state dict": lambda: plain_state_dict([net()]),
    "removed": step_after_removal,
    "state in the plain order": load_the_plain_order,
    "step inside plain": step_inside_plain,
    "assignment": assign,
    "no scaled weight": lambda: NormScaler.of(net()),
    "no optimizer": lambda: attach(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)),
    "no hooks": lambda: attach(Lookahead),
    "foreign optimizer": lambda: attach(lambda optimizer: optimizer, net().parameters()),
    "attached already": attach_twice,
    "a step from bad weights": step_from_bad_weights,
    "a model pickled": lambda: pickle.dumps(scaled()[0]),
    "a parameter assigned": lambda: setattr(scaled()[0].head, "weight", nn.Parameter(torch.ones(3, 8))),
    "a tensor assigned": lambda: setattr(scaled()[0].head, "weight", torch.ones(3, 8)),
}


@pytest.mark.parametrize("call", CASES.values(), ids=CASES)
def test_the_docs_quote_the_error(call):
    with pytest.raises((TypeError, ValueError, KeyError, RuntimeError)) as found:
        call()
    assert f"{type(found.value).__name__}: {found.value}" in TEXT


@pytest.mark.parametrize("call", ["step", "project", "retarget", "audit"])
def test_a_handle_without_weights_says_so(call):
    model, scaling = scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.attach(optimizer)
    # By another handle of the same model, which leaves the hooks of this one.
    NormScaler.of(model).remove()
    model.head(torch.ones(8)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=rf"{call}: no weight of Module is under this scaling any more"):
        getattr(scaling, call)()
    assert scaling.metrics() == {}
    assert repr(scaling) == "NormScaler(0 weights of Module, attached to SGD)"


def test_an_error_has_the_name_of_the_call_and_shows_where_it_came_from():
    refused = {
        apply_norm_scaling: lambda: apply_norm_scaling(nn.ReLU()),
        orthogonal_init_: lambda: orthogonal_init_(nn.ReLU()),
        spectral_norms: lambda: spectral_norms(nn.ReLU()),
        singular_values: lambda: singular_values(nn.ReLU()),
        remove_norm_scaling: lambda: remove_norm_scaling(nn.ReLU()),
        plain_state_dict: save_plain_with_another_on_top,
    }
    for call, refuse in refused.items():
        with pytest.raises(ValueError, match=f"^{call.__name__}: ") as found:
            refuse()
        assert found.traceback[-1].name != "run", "the frame that refused"


@pytest.mark.parametrize(("option", "note"), [("include", []), ("target", ["raised by the target function for 'en"])])
def test_what_a_users_function_raises_passes_as_it_is(option, note):
    def function(name, module):
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own") as found:
        apply_norm_scaling(net(), **{option: function})
    notes = getattr(found.value, "__notes__", [])
    assert len(notes) == len(note)
    assert all(one.startswith(start) for one, start in zip(notes, note, strict=True))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)


def made_for_inference():
    with torch.inference_mode():
        return net()


def scale_in_inference_mode():
    with torch.inference_mode():
        apply_norm_scaling(net())


def test_a_model_made_for_inference_can_be_measured():
    model = made_for_inference()
    exact = torch.linalg.matrix_norm(model.head.weight.clone().double(), 2).item()
    assert spectral_norms(model)["head"] == pytest.approx(exact, rel=1e-5)
    assert singular_values(model)["head"].max().item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: apply_norm_scaling(net(), generator=3), TypeError, "generator must be a torch.Generator, found int"),
        (lambda: apply_norm_scaling(net(), rules=3), TypeError, "rules takes LayerRule objects, found int"),
        (lambda: apply_norm_scaling(net(), rules=LayerRule), TypeError, "rules takes LayerRule objects, found type"),
        (lambda: NormScaler.of(None), TypeError, "NormScaler.of: expected a torch.nn.Module, found NoneType"),
        (lambda: MatrixView(3), TypeError, "axes must be a string"),
        (lambda: MatrixView("o i", count="2"), TypeError, "count a number of matrices"),
        (
            lambda: apply_norm_scaling(made_for_inference()),
            ValueError,
            "'encoder.0' was made under torch.infer",
        ),
        (scale_in_inference_mode, ValueError, r"under torch.inference_mode\(\) no state can be made"),
        (
            lambda: apply_norm_scaling(Outer(), rules=LayerRule(Outer, {"inner": MatrixView("o i")})),
            ValueError,
            "names 'inner' of '', which is a layer of its own, Linear; write a rule for that",
        ),
        (
            lambda: scaled()[1].remove() and attach_removed(),
            ValueError,
            "attach: no weight of Module is under this scaling any more",
        ),
    ],
)
def test_wrong_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


def attach_removed():
    model, scaling = scaled()
    scaling.remove()
    scaling.attach(torch.optim.SGD(model.parameters(), lr=0.1))

"""The norms of any model's weights, against torch.linalg in float64."""

import importlib
import math
import pkgutil

import pytest
import torch
from torch import nn

import specscale
from specscale import LayerRule, MatrixView, apply_norm_scaling, measure, singular_values, spectral_norms


class Mixed(nn.Module):
    """Weights of every kind: wide, tall, several matrices in one, in half precision, zero, and of one element."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.tall = nn.Linear(300, 120), nn.Linear(90, 200)
        self.grouped, self.qkv = nn.Conv2d(8, 12, 3, groups=2).to(memory_format=torch.channels_last), nn.Linear(40, 120)
        self.short, self.long, self.one = nn.Linear(100, 80).bfloat16(), nn.Linear(30, 40).double(), nn.Linear(1, 1)
        self.zero = nn.Linear(60, 50)
        nn.init.zeros_(self.zero.weight)
        for parameter in self.tall.parameters():
            parameter.requires_grad = False


VIEWS = {"grouped": MatrixView("(k o) i h w", 2), "qkv": MatrixView("(k o) i", 3)}


def exact(model, name):
    """The norms and the stable rank of a weight of `Mixed`, by an SVD in float64."""
    weight = getattr(model, name).weight.detach().double()
    values = torch.linalg.svdvals(VIEWS.get(name, MatrixView("o i")).matrices(weight))
    squares = values.square().sum(-1)
    ranks = torch.where(squares > 0, squares / values[:, 0].square(), 0)
    return values[:, 0].max().item(), squares.sqrt().max().item(), ranks.min().item()


def test_the_norms_are_those_of_an_svd():
    model = Mixed()
    norms = measure(model)
    names = [name for name, _ in model.named_children()]
    assert [one.name for one in norms.weights] == names == list(spectral_norms(model))
    for one in norms.weights:
        assert (one.spectral, one.frobenius, one.stable_rank) == pytest.approx(exact(model, one.name), rel=1e-5)
        assert (one.target, one.constraint) == (None, None)
        assert spectral_norms(model)[one.name] == one.spectral
    assert norms.as_dict()["grouped"].items() >= {"count": 2, "shape": (6, 36), "target": None}.items()
    assert norms.as_dict()["long"]["spectral"] == pytest.approx(exact(model, "long")[0], rel=1e-13)


def crowded(side):
    """Hundreds of equal singular values, as spectral scaling leaves them."""
    matrix = nn.init.orthogonal_(torch.empty(side, side))
    return matrix + torch.outer(matrix[0], matrix[1]) * 1e-3


def graded(side):
    left, right = (nn.init.orthogonal_(torch.empty(side, side)) for _ in range(2))
    return left @ torch.diag(torch.logspace(0, -12, side)) @ right


def same_sign(side):
    """One large singular value, and long sums of one sign."""
    return torch.rand(side, 20 * side)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("make", [crowded, graded, same_sign])
def test_no_spectrum_and_no_scale_is_hard(make, scale):
    torch.manual_seed(0)
    matrix = make(150) * scale
    layer = nn.Linear(*matrix.shape[::-1])
    layer.weight = nn.Parameter(matrix)
    (found,) = measure(nn.Sequential(layer)).weights
    values = torch.linalg.svdvals(matrix.double())
    assert found.spectral == pytest.approx(values[0].item(), rel=1e-5)
    assert found.frobenius == pytest.approx(values.square().sum().sqrt().item(), rel=1e-5)
    assert spectral_norms(nn.Sequential(layer)) == {"0": found.spectral}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224"])
def test_the_norms_of_whole_models_are_within_the_stated_error(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    values = singular_values(model)
    for one in measure(model).weights:
        assert one.spectral == pytest.approx(values[one.name].max().item(), rel=1e-5)
        squares = values[one.name].square().sum(-1)
        assert one.frobenius == pytest.approx(squares.sqrt().max().item(), rel=1e-5)
        assert one.stable_rank == pytest.approx((squares / values[one.name][:, 0].square()).min().item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "clipped"])
def test_a_scaled_model_has_its_targets_beside_its_norms(norm):
    model = Mixed()
    plain = {one.name: one for one in measure(model).weights}
    scaling = apply_norm_scaling(model, norm, target=0.5, exclude=["wide", "zero"])
    for one in measure(model).weights:
        is_scaled = one.name not in ("wide", "zero", "tall")
        assert (one.target, one.constraint) == ((0.5, norm) if is_scaled else (None, None))
        assert one.spectral == pytest.approx(plain[one.name].spectral, rel=1e-6)
    scaling.step()
    assert measure(model).as_dict()["one"]["spectral"] == pytest.approx(0.5)
    scaling.remove()
    assert all(one.target is None for one in measure(model).weights)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(7, 5), nn.Linear(5, 4)


def test_a_scaled_weight_is_read_as_the_matrices_that_are_scaled():
    model = Table()
    model.rows.weight.data = (
        nn.functional.normalize(model.rows.weight.data) * torch.tensor([1, 1, 3, 1, 1, 1, 1])[:, None]
    )
    assert list(measure(model).as_dict()) == ["head"]
    rows = LayerRule(nn.Embedding, {"weight": MatrixView("(k o) i", 7)})
    apply_norm_scaling(model, "frobenius", rules=rows, target=0.25, include="rows")
    norms = measure(model).as_dict()
    assert list(norms) == ["rows", "head"]
    assert norms["rows"].items() >= {"count": 7, "shape": (1, 5), "target": 0.25, "constraint": "frobenius"}.items()
    assert norms["rows"]["spectral"] == pytest.approx(3) == norms["rows"]["frobenius"]
    # A rule that is given comes first; the target is of other matrices.
    whole = LayerRule(nn.Embedding, {"weight": MatrixView("i o")})
    norms = measure(model, rules=whole).as_dict()["rows"]
    assert norms.items() >= {"count": 1, "shape": (5, 7), "target": None}.items()
    assert list(spectral_norms(model)) == list(singular_values(model)) == ["rows", "head"]


def test_the_table_has_a_line_for_each_weight_and_targets_where_there_are_some():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Conv2d(4, 4, 1, groups=2))
    model[0].weight.data = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
    model[1].weight.data = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 0]])[..., None, None]
    assert str(measure(model)).splitlines() == [
        "layer  matrices  shape  spectral  Frobenius  stable rank",
        "0             1    2x3         4          5          1.6",
        "1             2    2x2         2          2          1.0",
    ]
    apply_norm_scaling(model, "frobenius", include="0")
    assert str(measure(model)).splitlines() == [
        "layer  matrices  shape  spectral  Frobenius  stable rank  target  constraint",
        "0             1    2x3         4          5          1.6       5   frobenius",
        "1             2    2x2         2          2          1.0       -           -",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_has_no_norms_and_the_others_have(bad):
    model = Mixed()
    model.qkv.weight.data[3, 4] = bad
    norms = measure(model).as_dict()
    assert [name for name, one in norms.items() if math.isnan(one["spectral"])] == ["qkv"]
    assert all(math.isnan(norms["qkv"][column]) for column in ("spectral", "frobenius", "stable_rank"))
    assert "nan" in str(measure(model))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(TypeError, match=r"measure: expected a torch.nn.Module, found dict"):
        measure({})
    with pytest.raises(ValueError, match=r"measure: no weight of ReLU is selected"):
        measure(nn.ReLU())
    with pytest.raises(ValueError, match=r"measure: exclude pattern 'hed' matches no module; .* 'head'"):
        measure(Table(), exclude="hed")


def test_the_call_is_no_submodule():
    for module in pkgutil.walk_packages(specscale.__path__, "specscale."):
        if module.name.rpartition(".")[2] not in ("__main__", "lightning", "transformers", "kernels", "grouped"):
            importlib.import_module(module.name)
    assert specscale.measure is measure
    assert callable(measure)
    assert list(measure(Table(), include="head").as_dict()) == ["head"]

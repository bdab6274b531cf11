"""Which parameter learns how fast and decays or not, and the shape of the schedule."""

import math

import pytest
import torch
from helpers.support import CNN, VIT, tiny_model

from loopitr.training.optimization import parameter_groups, two_cycles, warmup_cosine, warmup_stable_decay

VARIANTS = {
    "vit": {"vision": VIT},
    "cnn": {"vision": CNN},
    "shared": {"vision": VIT, "style": "shared"},
    "mlm": {"vision": CNN, "mlm_head": True},
    "agreement": {"vision": VIT, "fusion": {"agreement": 12}},
}


def groups_of(model, **changes):
    return parameter_groups(model, **{"backbone_lr": 1e-5, "lr": 1e-3, "weight_decay": 0.1, **changes})


def names_of(model, group):
    held = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_is_in_exactly_one_group(variant):
    model = tiny_model(**VARIANTS[variant])
    held = [id(parameter) for group in groups_of(model) for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbones_and_new_layers_learn_at_their_own_rates(variant):
    model = tiny_model(**VARIANTS[variant])
    rates = {name: group["lr"] for group in groups_of(model) for name in names_of(model, group)}
    for name, rate in rates.items():
        backbone = name.startswith(("dual.vision.", "dual.text."))
        assert rate == (1e-5 if backbone else 1e-3), name
    assert rates["dual.logit_scale"] == rates["itm_head.weight"] == rates["dual.text_projection.bias"] == 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_matrices_decay(variant):
    model = tiny_model(**VARIANTS[variant])
    decays = {name: group["weight_decay"] for group in groups_of(model) for name in names_of(model, group)}
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    assert norms
    for name, decay in decays.items():
        free = name in norms or name.endswith("bias") or "position" in name or "pos_embed" in name
        free |= name.endswith(("logit_scale", "cls_token"))
        assert decay == (0.0 if free else 0.1), name
        assert free or shapes[name] >= 2
    assert decays["dual.text.model.embeddings.word_embeddings.weight"] == 0.1
    assert decays["dual.text.model.embeddings.position_embeddings.weight"] == 0.0
    assert decays["dual.vision_projection.weight"] == 0.1
    undecayed = {"cnn": "fusion.image_positions", "mlm": "mlm_head.bias"}.get(variant, "dual.vision.model.pos_embed")
    assert decays[undecayed] == 0


def test_frozen_parts_are_in_no_group():
    model = tiny_model()
    model.freeze(["vision", "dual_head"])
    held = {name for group in groups_of(model) for name in names_of(model, group)}
    assert held == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("dual.vision", "dual.logit_scale", "dual.text_projection")) for name in held)
    model.freeze(["text", "fusion"])
    assert groups_of(model) == []


def test_no_decay_leaves_a_parameter_without_gradient_where_it_is():
    model = tiny_model()
    optimizer = torch.optim.AdamW(groups_of(model, weight_decay=0.5, lr=0.1, backbone_lr=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["itm_head.weight"], before["itm_head.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(after["itm_head.bias"], before["itm_head.bias"])
    assert torch.equal(after["dual.logit_scale"], before["dual.logit_scale"])


@pytest.mark.parametrize(("steps", "warmup", "floor"), [(20, 5, 0.0), (20, 1, 0.1), (7, 7, 0.0), (1, 1, 0.0)])
def test_warmup_is_linear_and_then_a_cosine(steps, warmup, floor):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 0.4}, {"params": [parameters[1]], "lr": 2.0}])
    schedule = warmup_cosine(optimizer, steps=steps, warmup=warmup, floor=floor)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for step, (first, second) in enumerate(rates):
        if step < warmup:
            factor = (step + 1) / warmup
        else:
            factor = floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert first == pytest.approx(0.4 * factor)
        assert second == pytest.approx(2.0 * factor)
    assert max(first for first, _ in rates) == pytest.approx(0.4)  # The peak is reached.
    for _ in range(5):  # The floor is not left.
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * floor)


def test_the_second_cycle_starts_anew_with_slower_backbones():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    names = ("backbones", "new")
    groups = [{"params": [p], "lr": 1.0, "name": name} for p, name in zip(parameters, names, strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = two_cycles(optimizer, steps=30, first=10, warmup=0.2, backbones=0.1)
    rates = []
    for _ in range(30):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    alone = [0.5, 1.0, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(8))]
    loop = [0.25, 0.5, 0.75, 1.0, *((1 + math.cos(math.pi * step / 16)) / 2 for step in range(16))]
    assert [new for _, new in rates] == pytest.approx(alone + loop)
    assert [backbones for backbones, _ in rates] == pytest.approx(alone + [0.1 * value for value in loop])


@pytest.mark.parametrize(("first", "floor"), [(0, 0.0), (8, 0.0), (8, 0.2)])
def test_one_schedule_rises_stays_and_falls_whenever_the_fusion_head_joins(first, floor):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    names = ("backbones", "new")
    groups = [{"params": [p], "lr": 1.0, "name": name} for p, name in zip(parameters, names, strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_stable_decay(
        optimizer, steps=40, first=first, warmup=0.1, decay_start=0.7, backbones=0.5, floor=floor
    )
    rates = []
    for _ in range(45):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    fall = [floor + (1 - floor) * (12 - step) / 12 for step in range(12)]
    expected = [0.25, 0.5, 0.75, 1.0, *[1.0] * 24, *fall, *[floor] * 5]  # The floor is not left.
    assert [new for _, new in rates] == pytest.approx(expected)
    halved = [value if step < first else 0.5 * value for step, value in enumerate(expected)]
    assert [backbones for backbones, _ in rates] == pytest.approx(halved)

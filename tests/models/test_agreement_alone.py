"""A fusion head without layers: token agreement alone scores pairs."""

from __future__ import annotations

import pytest
import torch
from helpers.support import images, ragged_texts, tiny_config, tiny_model
from helpers.tiny_building import build, scratch
from helpers.tiny_run import run

from loopitr import LoopITRConfig, LoopITRModel, LoopObjective, Matching, Ranking, TopK
from loopitr.building.options import FusionOptions
from loopitr.export.graphs import FusionGraph
from loopitr.training.options import PretrainOptions

ALONE = {"num_layers": 0, "agreement": 12}
PAIRS = torch.tensor([[0, 3], [2, 1], [0, 3], [1, 0], [2, 4]])


@pytest.fixture(scope="module")
def model() -> LoopITRModel:
    model = tiny_model(fusion=ALONE).eval()
    assert model.agreement is not None
    torch.nn.init.normal_(model.agreement.score.weight)
    return model


def test_the_match_score_is_the_agreement(model):
    image_state, text_state = model.encode_images(images(3)), model.encode_texts(*ragged_texts(5))
    expected = model.agreement_of_all(image_state, text_state)
    for state in (image_state, model.project_images(image_state)):
        for block_size in (None, 2):
            scores = model.score_pairs(state, text_state, PAIRS, block_size=block_size)
            torch.testing.assert_close(scores.score, expected[PAIRS[:, 0], PAIRS[:, 1]])
            assert not scores.logits[:, 0].any()
    graph = FusionGraph(model)(image_state.tokens, text_state.tokens, text_state.mask.long())
    torch.testing.assert_close(graph, expected)
    with torch.no_grad():  # Without gradient, blocks are as large as the memory for them allows.
        torch.testing.assert_close(model.score_pairs(image_state, text_state, PAIRS).score, scores.score)


def test_it_has_no_weights_that_nothing_uses(model, tmp_path):
    names = [name for name, _ in model.named_parameters() if not name.startswith("dual.")]
    assert names and all(name.startswith("agreement.") for name in names)
    model.save_pretrained(tmp_path)
    again = LoopITRModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again.freeze(["fusion"])
    assert not any(parameter.requires_grad for parameter in again.agreement.parameters())


def test_the_matching_losses_train_it():
    objective = LoopObjective(tiny_model(fusion=ALONE), [Matching(), Ranking()], miner=TopK(2))
    ids, mask = ragged_texts(4)
    output = objective(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=images(4),
        identities=torch.arange(4),
        caption_ids=torch.arange(4),
    )
    output.loss.backward()
    assert objective.model.agreement.score.weight.grad.abs().sum() > 0
    assert output.terms["itm"] > 0


def test_a_run_trains_and_reranks_with_it(tmp_path):
    changes = {"model__fusion__num_layers": 0, "model__fusion__agreement": 8}
    metrics = run(tmp_path, **changes, objective__distillation=0.0, objective__agreement=1.0, objective__mlm=0.0)
    assert metrics["match"]
    assert LoopITRModel.from_pretrained(tmp_path / "run").itm_head is None


def test_no_words_are_predicted_by_default_where_no_tokens_are_fused():
    options = PretrainOptions(model=scratch(fusion=FusionOptions(num_layers=0, agreement=8)))
    decided = options.decided()
    assert (decided.objective.mlm, decided.objective.agreement, decided.model.mlm_head) == (0.0, 1.0, False)


@pytest.mark.parametrize(
    ("fusion", "fault"),
    [
        ({"num_layers": 0}, "fusion.num_layers 0 needs fusion.agreement"),
        ({**ALONE, "style": "shared"}, "fusion.num_layers 0 needs fusion.style 'late', got 'shared'"),
        ({**ALONE, "image_positions": True}, "fusion.num_layers 0 has no use for fusion.image_positions"),
        ({**ALONE, "num_layers": False}, "fusion.num_layers must be a positive integer, got False"),
        ({**ALONE, "num_layers": -1}, "fusion.num_layers must be a positive integer, got -1"),
    ],
)
def test_what_does_not_go_with_it(fusion, fault):
    with pytest.raises(ValueError, match=fault):
        LoopITRConfig(vision=tiny_config().vision, text=tiny_config().text, fusion=fusion)


def test_word_prediction_needs_layers(tmp_path):
    fusion = FusionOptions(num_layers=0, agreement=8)
    with pytest.raises(ValueError, match="mlm_head needs fused tokens"):
        build(scratch(fusion=fusion, mlm_head=True))
    with pytest.raises(ValueError, match="'text_upper_layers' initialises layers, but fusion.num_layers is 0"):
        build(scratch(fusion=FusionOptions(num_layers=0, agreement=8, init="text_upper_layers")))
    model, processor = build(scratch(fusion=fusion))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.mlm_head needs fused tokens, and this model has no fusion layers"):
        build(scratch(init=str(tmp_path), mlm_head=True))

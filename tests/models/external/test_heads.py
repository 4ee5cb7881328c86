"""Heads that make classes, boxes or masks stay dense: known by name, or found as the last layers before an output."""

import pytest
import timm
import torch
import transformers as T
from torch import nn
from transformers.utils import ModelOutput

from models.external import model as external
from models.external.heads import heads_by_kind
from models.external.layer_names import is_head
from tests.tiny_models import VISION

pytestmark = pytest.mark.script

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2}
DETR |= {"decoder_attention_heads": 2, "num_queries": 5, "num_labels": 4, "decoder_layers": 2, "encoder_layers": 1}
STAGES = ["stage2", "stage3", "stage4"]
RT = {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32] * 3}


def backbone(*stages):
    return {"use_timm_backbone": False, "backbone_config": T.ResNetConfig(**RESNET, out_features=list(stages))}


def rt_backbone():
    return {"backbone_config": T.RTDetrResNetConfig(**RESNET, out_features=STAGES)}


def deformable(**options):
    return T.DeformableDetrForObjectDetection(T.DeformableDetrConfig(**backbone(*STAGES), **DETR, **options))


def owl():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    return T.OwlViTForObjectDetection(T.OwlViTConfig(text_config=text, vision_config=VISION, projection_dim=32))


def segformer():
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    return T.SegformerForSemanticSegmentation(T.SegformerConfig(**sizes, decoder_hidden_size=16))


def sam():
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    vision |= {"output_channels": 32, "global_attn_indexes": [0], "mlp_dim": 32}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    vision["num_pos_feats"] = 16
    parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    return T.SamModel(T.SamConfig(**parts))


def conditional():
    return T.ConditionalDetrForObjectDetection(T.ConditionalDetrConfig(**backbone("stage4"), **DETR))


BOXES = ("bbox_embed", "class_embed")
# Model -> parts of names of layers that make what it predicts; everything else is pruned.
MODELS = {
    "DETR": (
        lambda: T.DetrForObjectDetection(T.DetrConfig(**backbone("stage4"), **DETR)),
        ("class_labels_classifier", "bbox_predictor"),
    ),
    "Conditional DETR": (conditional, ("class_labels_classifier", "bbox_predictor", "ref_point_head")),
    "Deformable DETR": (deformable, (*BOXES, "model.reference_points")),
    "Deformable DETR, refined": (lambda: deformable(with_box_refine=True), (*BOXES, "model.reference_points")),
    "Deformable DETR, two stages": (lambda: deformable(with_box_refine=True, two_stage=True), BOXES),
    "RT-DETR": (
        lambda: T.RTDetrForObjectDetection(T.RTDetrConfig(**rt_backbone(), **RT, **{**DETR, "encoder_layers": 1})),
        (*BOXES, "enc_score_head", "enc_bbox_head"),
    ),
    "RT-DETR v2": (
        lambda: T.RTDetrV2ForObjectDetection(T.RTDetrV2Config(**rt_backbone(), **RT, **DETR)),
        (*BOXES, "enc_score_head", "enc_bbox_head"),
    ),
    "YOLOS": (
        lambda: T.YolosForObjectDetection(T.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=5)),
        ("class_labels_classifier", "bbox_predictor"),
    ),
    "OWL-ViT": (owl, ("class_head", "box_head", "text_projection")),
    "SegFormer": (segformer, ("decode_head",)),
    "SAM": (sam, ("output_hypernetworks_mlps", "iou_prediction_head")),
    "ViT": (lambda: T.ViTForImageClassification(T.ViTConfig(**VISION)), ("classifier",)),
}


def linear(model):
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("kind", MODELS)
def test_no_layer_that_makes_classes_boxes_or_masks_is_pruned(kind):
    torch.manual_seed(0)
    make, parts = MODELS[kind]
    model = make()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    view = external.prunable_view(model)
    pruned = {alias.removesuffix(".weight") for weight in view.weights.values() for alias in weight.aliases}
    expected = {name for name in linear(model) if not any(part in name for part in parts)}
    assert pruned == expected
    assert model.training and [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("kind", ["DETR", "Deformable DETR", "RT-DETR", "YOLOS", "OWL-ViT", "ViT"])
def test_the_names_alone_say_no_more_than_the_graph(kind):
    """A head that is called otherwise is found all the same."""
    torch.manual_seed(0)
    model = MODELS[kind][0]().eval()
    found = heads_by_kind(model)
    named = {name for name in linear(model) if is_head(name) or any(is_head(part) for part in _above(name))}
    inside = {name for name in linear(model) if found & {name, *_above(name)}}
    weights = {id(model.get_submodule(name).weight) for name in inside}
    assert {id(model.get_submodule(name).weight) for name in named} <= weights


def _above(name):
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


class Foreign(T.PreTrainedModel):
    """A detector whose heads have names that nobody knows, one of them deep inside."""

    config_class, main_input_name, base_model_prefix = T.ViTConfig, "pixel_values", "trunk"

    def __init__(self, config, known=False):
        super().__init__(config)
        width = config.hidden_size
        self.trunk = T.ViTModel(config, add_pooling_layer=False)
        self.trunk.aside = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.alpha, self.neck, self.norm = nn.Linear(width, 4), nn.Linear(width, width), nn.LayerNorm(width)
        self.beta = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)) for _ in "ab"]
        )
        self.post_init()

    def forward(self, pixel_values):
        hidden = self.norm(self.neck(self.trunk(pixel_values).last_hidden_state))
        start = self.trunk.aside(hidden).repeat(1, 1, 2)
        boxes = [(head(hidden) + start).sigmoid() for head in self.beta]
        return ModelOutput(
            logits=self.alpha(hidden), pred_boxes=boxes[0], auxiliary=[{"pred_boxes": boxes[1]}], seen=hidden
        )


def test_heads_of_any_name_are_the_last_layers_on_the_way_to_a_prediction(caplog):
    torch.manual_seed(0)
    model = Foreign(T.ViTConfig(**VISION))
    assert heads_by_kind(model) == {"alpha", "beta", "trunk.aside"}
    view = external.prunable_view(model)
    heads = {"alpha", *(f"{part}.{i}" for part in ("beta.0", "beta.1", "trunk.aside") for i in (0, 2))}
    assert {key.removesuffix(".weight") for key in view.dense} == heads
    assert "neck.weight" in view.weights and "no layer is known" not in caplog.text


def test_a_warning_where_no_head_is_known(caplog):
    external.prunable_view(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert "no layer is known as the model's output head: none is kept dense (--exclude" in caplog.text
    caplog.clear()
    external.prunable_view(timm.create_model("test_vit"))
    external.prunable_view(T.ViTForImageClassification(T.ViTConfig(**VISION)))
    assert "no layer is known" not in caplog.text

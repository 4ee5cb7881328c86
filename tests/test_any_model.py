"""prune.py on models that are not the project's own, end to end, and the Python API as docs/quickstart.md has it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

import maskllm_train
import prune
from configs.loading import load_config
from engine.launch import run
from models.external import model as external
from models.xvlm import model as xvlm
from sparsity.masks import Masks
from tests import tiny_models
from tests.tiny_models import image_processor, tokenizer

QUICK = ["--accelerator", "cpu", "--num_batches", "2", "--batch_size", "3"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("engine.reports.pictures.Pictures.draw", lambda self, title: [])


pytestmark = [pytest.mark.script, pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images of two classes each, with captions."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / kind / f"{i}.png")
            (folder / kind / f"{i}.txt").write_text(f"a photo : {kind} w{20 + i}")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    return tiny_models.save(tiny_models.clip(), tmp_path_factory.mktemp("models") / "clip", processor)


def options(folder, model, pruner, *more):
    return ["-m", model, "-p", pruner, "--output_dir", str(folder), "-s", "50", *QUICK, *more]


def pruned(folder, model, pruner, *more):
    """Prune in this process: the folder of the results and the masks."""
    prune.main(options(folder, model, pruner, *more))
    (path,) = (folder / pruner).glob("*_50_seed42_pruning_masks.safetensors")
    return folder / pruner, Masks.load(path)


def half(masks):
    return masks.total - masks.kept == masks.total // 2


def test_a_timm_model_without_data(tmp_path):
    folder, masks = pruned(tmp_path, "timm:test_vit", "omp", "--weights", "random", "--save_model")
    assert half(masks)
    saved = folder / "timm_test_vit_omp_50_seed42_model.safetensors"
    plain = timm.create_model("test_vit", checkpoint_path=str(saved)).state_dict()
    for name, mask in masks.items():
        assert not plain[name][~mask].any() and plain[name][mask].all()
    assert "vision %" in (folder / "report.md").read_text()
    _, again = pruned(tmp_path / "again", "timm:test_vit", "omp", "--weights", str(saved))
    assert again.digest() == masks.digest(), "what is zero goes first"


def test_a_timm_model_with_classes(tmp_path, photos):
    (tmp_path / "map.json").write_text('{"cat": "n02123045", "dog": 207}')
    data = ["--weights", "random", "--calibration", str(photos), "--class_map", str(tmp_path / "map.json")]
    _, masks = pruned(tmp_path, "timm:test_vit", "snip", *data)
    assert half(masks)
    assert masks.provenance["config"]["calibration"] == str(photos)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """dog, cat and zebra, in this order."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**tiny_models.VISION, id2label={0: "dog", 1: "cat", 2: "zebra"})
    model = transformers.ViTForImageClassification(config)
    return tiny_models.save(model, tmp_path_factory.mktemp("models") / "vit", image_processor())


def test_classes_that_the_model_has_not_are_refused_where_there_is_a_loss(tmp_path, classifier, photos, capsys):
    _, known = pruned(tmp_path / "known", f"hf:{classifier}", "snip", "--calibration", str(photos))
    (other := tmp_path / "other").mkdir()
    shutil.copytree(photos / "cat", other / "cat")
    shutil.copytree(photos / "dog", other / "horse2")
    with pytest.raises(ValueError, match="1 of 2 class folders are none of the model's 3 classes: 'horse2'; the model"):
        pruned(tmp_path / "refused", f"hf:{classifier}", "snip", "--calibration", str(other))
    (tmp_path / "map.json").write_text('{"cat": "cat", "horse2": "dog"}')
    mapped = ["--calibration", str(other), "--class_map", str(tmp_path / "map.json")]
    _, given = pruned(tmp_path / "mapped", f"hf:{classifier}", "snip", *mapped)
    assert given.digest() == known.digest(), "the same images with the same labels, in the same order"
    _, masks = pruned(tmp_path / "no loss", f"hf:{classifier}", "multiflow", "--calibration", str(other))
    assert half(masks), "what reads no labels needs none"


def test_a_folder_of_transformers_with_captions(tmp_path, clip, photos):
    folder, masks = pruned(tmp_path, f"hf:{clip}", "snip", "--calibration", str(photos), "--save_model")
    assert half(masks)
    saved = transformers.CLIPModel.from_pretrained(folder / "hf_clip_snip_50_seed42_model")
    assert all(not saved.state_dict()[name][~mask].any() for name, mask in masks.items())
    transformers.AutoProcessor.from_pretrained(folder / "hf_clip_snip_50_seed42_model")
    report = yaml.safe_load((folder / "config.yaml").read_text())
    assert report["config"]["weights"] == "published" and report["config"]["batch_size"] == 3


def test_the_iterative_pruner_reads_fresh_batches(tmp_path, clip, photos):
    _, once = pruned(tmp_path / "1", f"hf:{clip}", "itersnip", "--calibration", str(photos))
    _, often = pruned(tmp_path / "2", f"hf:{clip}", "itersnip", "--calibration", str(photos), "-e", "3")
    assert half(once) and half(often) and once.digest() != often.digest()


def test_masks_are_learned_on_the_loss_of_a_model(tmp_path, clip, photos):
    given = ["--model", f"hf:{clip}", "--calibration", str(photos), "--exclude", "*.fc2", "--mask-only", *QUICK]
    maskllm_train.main([*given, "--output", str(tmp_path), "--experiment", "run", "--epochs", "2", "--lr", "0.05"])
    masks = Masks.load(tmp_path / "run/mask.safetensors")
    masks.check(external.prunable_view(external.build(f"hf:{clip}"), exclude=["*.fc2"]))
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())
    plain = transformers.CLIPModel.from_pretrained(clip)
    state, before = load_file(tmp_path / "run/model.safetensors"), plain.state_dict()
    plain.load_state_dict(state)
    assert all(torch.equal(state[name], before[name] * masks.get(name, torch.tensor(True))) for name in state)


def test_layers_and_groups_of_choice(tmp_path, clip, photos):
    chosen = ["--include", "*.mlp.*,*.self_attn.*", "--exclude", "*.fc2", "--groups", "a=*.mlp.*,b=vision_*,b=text_*"]
    folder, masks = pruned(tmp_path, f"hf:{clip}", "multiflow", "--calibration", str(photos), *chosen)
    view = external.prunable_view(external.build(f"hf:{clip}"), exclude=["*.fc2"])
    assert list(masks) == list(view.weights)
    for group, part in (("a", ".mlp."), ("b", ".self_attn.")):
        gone = sum(int((~mask).sum()) for name, mask in masks.items() if part in name)
        assert gone == sum(mask.numel() for name, mask in masks.items() if part in name) // 2
        assert f"{group} %" in (folder / "report.md").read_text()


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def batches(seed, epoch):
    generator = torch.Generator().manual_seed(seed + epoch)
    return [(torch.randn(5, 8, generator=generator),) for _ in range(4)]


def loss(model, batch):
    return model(*batch).square().mean()


HERE = "tests.test_any_model"


@pytest.mark.parametrize("pruner", ["snip", "multiflow"])
def test_a_model_with_batches_and_loss_of_ones_own(tmp_path, pruner):
    data = ["--calibration", f"{HERE}:batches", "--loss", f"{HERE}:loss"]
    folder, masks = pruned(tmp_path, f"{HERE}:model", pruner, *data, "--exclude", "2")
    assert list(masks) == ["0.weight"] and half(masks)
    assert (folder / f"{HERE}_model_{pruner}_50_seed42_pruning_masks.safetensors").is_file()


def test_a_configuration_file(tmp_path, clip, photos):
    content = {"calibration": str(photos), "exclude": ["text_model"], "groups": {"eyes": ["vision_model.*"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    folder, masks = pruned(tmp_path / "out", f"hf:{clip}", "multiflow", "--config", str(tmp_path / "c.yaml"))
    assert half(masks) and all(name.startswith("vision_model.") for name in masks)
    assert "eyes %" in (folder / "report.md").read_text()


def test_a_text_model_on_a_file_of_texts(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**tiny_models.TEXT, num_key_value_heads=2)
    folder = tiny_models.save(transformers.LlamaForCausalLM(config).bfloat16(), tmp_path / "llama", tokenizer())
    (tmp_path / "captions.txt").write_text("\n".join(f"a photo : red cat w{i % 70}" for i in range(40)))
    data = ["--calibration", str(tmp_path / "captions.txt"), "--max_tokens", "12", "--evaluate"]
    out, masks = pruned(tmp_path / "out", f"hf:{folder}", "wanda", *data, "--save_model")
    assert half(masks)
    report = (out / "report.md").read_text()
    assert all(column in report for column in ("cos %", "pooled %", "agree %", "KL mnat", "perplexity", "eval s"))
    assert "captions.txt: 40 texts ('a photo : red cat w0', 'a photo : red cat w1' and 38 more)" in report
    assert "2 batches of at most 3 an epoch, from 21 of the 24" in report
    saved = transformers.LlamaForCausalLM.from_pretrained(next(out.glob("*_model")), dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert all(not saved.state_dict()[name][~mask].any() for name, mask in masks.items())


def test_evaluation_of_pairs_on_what_is_held_out(tmp_path, clip, photos):
    out, _ = pruned(tmp_path / "a", f"hf:{clip}", "wanda", "--calibration", str(photos), "--evaluate")
    report = (out / "report.md").read_text()
    for column in ("cos vision %", "cos text %", "pooled vision %", "pooled text %", "agree %", "KL mnat"):
        assert column in report
    assert "i2t R@1" in report and "8 images (cat/0.png, cat/1.png, cat/2.png and 5 more), with captions" in report
    assert "from 7 of the 8" in report
    out, masks = pruned(tmp_path / "b", f"hf:{clip}", "omp", "--evaluation", str(photos), "--evaluate")
    assert half(masks) and "t2i R@5" in (out / "report.md").read_text()


def test_evaluation_of_a_classifier_of_timm_at_another_size(tmp_path, photos):
    torch.save(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "w.pt")
    (tmp_path / "map.json").write_text('{"cat": 281, "dog": 207}')
    data = ["--weights", str(tmp_path / "w.pt"), "--img_size", "64", "--evaluation", str(photos), "--evaluate"]
    out, masks = pruned(tmp_path, "timm:test_vit", "omp", *data, "--class_map", str(tmp_path / "map.json"))
    dense = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("| dense"))
    assert half(masks) and "top-1" in (out / "report.md").read_text() and "100.0" in dense


def test_tokens_of_images_or_of_texts(tmp_path, photos):
    torch.manual_seed(0)
    processor = transformers.LlavaProcessor(
        image_processor(),
        tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    folder = tiny_models.save(tiny_models.llava(), tmp_path / "llava", processor)
    digests = set()
    for tokens in ("all", "text", "vision"):
        given = ["--calibration", str(photos), "--calibrate_on", tokens]
        _, masks = pruned(tmp_path / tokens, f"hf:{folder}", "wanda", *given)
        assert half(masks)
        digests.add(masks.digest())
    assert len(digests) == 3


def test_a_saved_model_of_the_projects_own(tmp_path):
    config = ["--config", "tests/data/configs/prune.yaml", "--accelerator", "cpu", "--output_dir", str(tmp_path)]
    prune.main(["-m", "xvlm", "-p", "omp", "-s", "50", "--save_model", *config])
    masks = Masks.load(tmp_path / "omp" / "xvlm_omp_50_seed42_pruning_masks.safetensors")
    sizes = load_config("tests/data/configs/model.yaml", xvlm.Config)
    model = xvlm.build(sizes, tmp_path / "omp" / "xvlm_omp_50_seed42_model.safetensors")
    assert all(not model.state_dict()[name][~mask].any() for name, mask in masks.items())


def test_what_would_be_read_is_listed(photos, capsys):
    for given, code, told in (
        (["--calibration", str(photos)], 0, "8 images with captions of 2 classes; 8 of 8 images looked up are there"),
        (
            ["--calibration", "absent"],
            1,
            "--calibration absent: neither a folder, a file of texts nor package.module:function",
        ),
        (["--calibration", f"{HERE}:batches"], 0, "a function, which was not called"),
    ):
        with pytest.raises(SystemExit) as caught:
            prune.main(["-m", "timm:test_vit", "--check_data", *given])
        assert caught.value.code == code and told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["-m", "timm:test_vit", "-p", "multiflow"],
            "this pruner needs --calibration, a folder of images or sounds, a file",
        ),
        (
            ["-m", "timm:test_vit", "-p", "snip", "--calibration", "absent"],
            "--calibration absent: neither a folder, a file of texts nor ",
        ),
        (
            ["-m", "timm:test_vit", "-p", "snip", "--calibration", ".", "--class_map", "absent.json"],
            "--class_map absent.json: there is no such file",
        ),
        (
            ["-m", "timm:test_vit", "-p", "omp", "--evaluate"],
            "there is nothing to evaluate timm:test_vit on",
        ),
        (["-m", "timm:test_vit", "-p", "omp", "--variant", "mini"], "--variant is for xvlm, "),
        (["-m", "timm:test_vit", "-p", "omp"], "the hub cannot be reached"),
        (["-m", "timm:test_vitt", "-p", "omp"], "did you mean timm:test_vit?"),
        (["-m", "timm:test_vit", "-p", "omp", "--weights", "absent.pth"], "absent.pth: weights file not found"),
        (["-m", "timm:test_vit", "-p", "omp", "--weights", "random", "--exclude", "vision"], "--exclude: no layer"),
        (["-m", "timm:test_vit", "-p", "omp", "--weights", "random", "--exclude", "blocks"], "no prunable weight"),
        (["-m", "timm:", "-p", "omp"], "there is no model 'timm:'; there are xvlm, "),
        (["-m", "xvlm", "-p", "omp", "--calibration", "images"], "--calibration is for other models (timm:NAME"),
        (["-m", f"{HERE}:modl", "-p", "omp"], f"-m {HERE}:modl: {HERE} has no function 'modl', did you mean 'model'?"),
        (["-m", f"{HERE}:model", "-p", "snip", "--calibration", "."], "only models of timm and transformers bring"),
        (["-m", f"{HERE}:model", "-p", "snip", "--calibration", f"{HERE}:batches"], "the model returns no loss"),
        (["-m", f"{HERE}:model", "-p", "omp", "--loss", "cross entropy"], "loss must be package.module:function"),
        (["-m", f"{HERE}:model", "-p", "omp", "--groups", "vision"], "expected name=glob,name=glob, got 'vision'"),
        (["-m", f"{HERE}:model", "-p", "omp", "--include", "a,,b"], "expected globs like"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, capsys, given, told):
    with pytest.raises(SystemExit) as caught:
        run(lambda: prune.main([*given, "--output_dir", str(tmp_path / "out"), "--accelerator", "cpu"]))
    heard = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("error")]
    assert caught.value.code == 2 and len(heard) == 1 and told in heard[0]
    assert not (tmp_path / "out").exists()


# The Python API


def test_the_snippet_of_the_quickstart(capsys):
    section = re.search(r"#+ In Python\n(.*?)\n#", Path("docs/quickstart.md").read_text(), re.DOTALL)[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(code, names)
    view, masks, model = names["view"], names["masks"], names["model"]
    assert sum(int((~mask).sum()) for mask in masks.values()) == sum(mask.numel() for mask in masks.values()) // 2
    assert all(not view.weights[name].parameter[~mask].any() for name, mask in masks.items())
    assert set(masks) < set(model.state_dict())
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 6


# The hub


class Hub:
    """Record what is asked of the hub."""

    asked: list = []

    def create_repo(self, name, **options):
        self.asked.append(("create", name, options["private"]))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path):
        self.asked.append(("folder", repo_id, sorted(path.name for path in folder_path.iterdir())))

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
        self.asked.append(("file", repo_id, path_in_repo))


def test_models_go_to_the_hub_with_a_card(tmp_path, clip, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.asked = []
    folder, _ = pruned(tmp_path, f"hf:{clip}", "omp", "--save_model", "--push_to_hub", "me/clip")
    (saved,) = folder.glob("*_model")
    text = (saved / "README.md").read_text()
    assert "library_name: transformers" in text and "- sparsity: 50" in text and "| all " in text
    assert Hub.asked[0] == ("create", "me/clip-omp-50", True) and "README.md" in Hub.asked[1][2]
    assert "https://hub/me/clip-omp-50" in capsys.readouterr().out
    Hub.asked = []
    given = ["--weights", "random", "--save_model", "--push_to_hub", "me/vit"]
    pruned(tmp_path / "timm", "timm:test_vit", "omp", *given)
    assert [each[-1] for each in Hub.asked[1:]] == ["model.safetensors", "README.md"]


def test_nothing_goes_to_the_hub_without_a_token_or_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    given = ["--weights", "random", "--push_to_hub", "me/vit"]
    with pytest.raises(ValueError, match="--push_to_hub uploads what --save_model writes"):
        pruned(tmp_path, "timm:test_vit", "omp", *given)
    with pytest.raises(ValueError, match="--push_to_hub: there is no token"):
        pruned(tmp_path, "timm:test_vit", "omp", *given, "--save_model")

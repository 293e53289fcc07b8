import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from softclip.checkpoints import TINY, load_clip, load_roi, model_config, new_clip, save_clip, save_roi, tokenizer_of
from softclip.model import RoiEncoder


@pytest.fixture(scope="module")
def tiny():
    return new_clip("tiny-vit", seed=0)


def features(clip, size=32):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        images = clip.eval().encode_image(torch.randn(2, 3, size, size, generator=generator))
        return images, clip.encode_text(torch.arange(32).view(2, 16))


def same(clip, other, size=32):
    return all(torch.equal(a, b) for a, b in zip(features(clip, size), features(other, size), strict=True))


@pytest.mark.parametrize("name", TINY)
def test_open_clip_loads_what_was_saved(tmp_path, name):
    clip, config = new_clip(name, seed=0)
    clip(torch.randn(4, 3, 32, 32), torch.ones(4, 16, dtype=torch.int64))  # running statistics move off their start
    save_clip(tmp_path, clip, config, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert same(clip, again)
    assert preprocess.transforms[-1].mean == [0.5, 0.4, 0.3]
    assert load_file(tmp_path / "open_clip_model.safetensors").keys() == clip.state_dict().keys()
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a"]).shape == (1, 16)
    ours = load_clip(str(tmp_path))
    assert same(clip, ours.clip)
    assert not ours.clip.training
    assert (ours.model_cfg, ours.mean, ours.std, ours.image_size) == (config, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), 32)
    assert torch.equal(ours.tokenizer(["a red cat"]), tokenizer_of(config)(["a red cat"]))
    assert {path.name for path in tmp_path.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}


def test_a_seed_decides_the_weights_and_leaves_the_generator_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, _ = new_clip("tiny-vit", seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert same(tiny[0], again)
    assert not same(tiny[0], new_clip("tiny-vit", seed=1)[0])
    assert not same(new_clip("tiny-vit")[0], new_clip("tiny-vit")[0])


@pytest.mark.parametrize("name", TINY)
def test_another_image_size(tmp_path, name):
    clip, config = new_clip(name, seed=0, image_size=64)
    save_clip(tmp_path, clip, config)
    assert load_clip(str(tmp_path)).image_size == 64
    assert same(clip, open_clip.create_model(f"local-dir:{tmp_path}"), 64)
    assert TINY[name]["vision_cfg"]["image_size"] == 32


def test_names_of_open_clip_and_json_files(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(TINY["tiny-vit"] | {"custom_text": True}))
    clip, config = new_clip(str(tmp_path / "mine.json"), seed=0)
    assert isinstance(clip, open_clip.CustomTextCLIP)
    save_clip(tmp_path / "folder", clip, config)
    assert same(clip, load_clip(str(tmp_path / "folder")).clip)
    assert model_config("ViT-B/32") == open_clip.get_model_config("ViT-B-32")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_name_with_a_file(tmp_path, tiny, suffix):
    clip, _ = tiny
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":  # as open_clip's training writes it, under DistributedDataParallel
        state = {f"module.{key}": value for key, value in clip.state_dict().items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": state | {"module.roi_encoder.w": torch.ones(1)}}, path)
    else:
        save_file(clip.state_dict(), path)
    loaded = load_clip(f"tiny-vit:{path}")
    assert same(clip, loaded.clip)
    assert loaded.mean == open_clip.OPENAI_DATASET_MEAN


def test_what_does_not_fit_is_counted_and_named(tmp_path, tiny):
    clip, _ = tiny
    state = clip.state_dict()
    names = [key for key in state if key.startswith("visual.transformer.resblocks.2.")]
    wrong = {key: value for key, value in state.items() if key not in names} | {"extra": torch.ones(1)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(
        ValueError, match=rf"{len(names)} tensors are missing: {names[0]}, .*, \.\.\.; 1 .* unexpected: extra"
    ):
        load_clip(f"tiny-vit:{tmp_path / 'wrong.safetensors'}")
    save_file(state | {"text_projection": torch.ones(3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"shape\.safetensors cannot be loaded .*text_projection.*\[3, 3\]") as error:
        load_clip(f"tiny-vit:{tmp_path / 'shape.safetensors'}")
    assert "\n" not in str(error.value)
    save_clip(tmp_path / "folder", clip, TINY["tiny-resnet"])
    with pytest.raises(ValueError, match=r"cannot be loaded into the network: .*size mismatch"):
        load_clip(str(tmp_path / "folder"))


def test_no_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be loaded"):
        load_clip(f"tiny-vit:{tmp_path / 'evil.pt'}")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("RN50", ValueError, "'RN50' is no folder, and a name alone has no weights"),
        ("nonsense:x.pt", ValueError, "model 'nonsense' is unknown: choose tiny-resnet, tiny-vit"),
        (
            "tiny-vit:absent.pt",
            FileNotFoundError,
            "absent.pt: no such file, and no tag that open_clip knows for tiny-vit",
        ),
        ("absent.json:x.pt", FileNotFoundError, "absent.json"),
    ],
)
def test_what_cannot_be_loaded(spec, error, message):
    with pytest.raises(error, match=message):
        load_clip(spec)


def test_folders_and_files_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no open_clip_config\.json; expected a folder that"):
        load_clip(str(tmp_path))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a model of open_clip, with embed_dim"):
        new_clip(str(tmp_path / "list.json"))
    (tmp_path / "half.json").write_text('{"embed_dim": ')
    with pytest.raises(ValueError, match=r"half\.json: not JSON"):
        new_clip(str(tmp_path / "half.json"))


@pytest.mark.parametrize("name", TINY)
def test_the_roi_encoder_lies_beside_the_clip(tmp_path, name):
    clip, config = new_clip(name, seed=0)
    encoder = RoiEncoder(clip.visual, 7).eval()
    save_clip(tmp_path, clip, config)
    assert load_roi(tmp_path, clip.visual) is None
    save_roi(tmp_path, encoder)
    loaded = load_clip(str(tmp_path))  # open_clip's weights are found beside it
    roi, mask = torch.randn(2, 3, 7), torch.tensor([[True, True, False], [True, False, False]])
    again = load_roi(tmp_path, loaded.clip.visual)
    with torch.no_grad():
        assert torch.equal(again(loaded.clip.visual, roi, mask), encoder(clip.eval().visual, roi, mask))
    assert same(clip, open_clip.create_model(f"local-dir:{tmp_path}"))
    other, _ = new_clip(next(iter(TINY.keys() - {name})))
    with pytest.raises(ValueError, match=r"roi_encoder\.safetensors does not fit the image tower"):
        load_roi(tmp_path, other.visual)


def test_a_tokenizer_of_hugging_face_is_kept_in_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "cat": 2, "dog": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path / "tokenizer")
    text = TINY["tiny-vit"]["text_cfg"] | {"hf_tokenizer_name": str(tmp_path / "tokenizer")}
    (tmp_path / "mine.json").write_text(json.dumps(TINY["tiny-vit"] | {"text_cfg": text}))
    clip, config = new_clip(str(tmp_path / "mine.json"), seed=0)
    save_clip(tmp_path / "folder", clip, config)
    (tmp_path / "tokenizer").rename(tmp_path / "gone")
    for tokenizer in (
        load_clip(str(tmp_path / "folder")).tokenizer,
        open_clip.get_tokenizer(f"local-dir:{tmp_path}/folder"),
    ):
        assert tokenizer(["dog cat"])[0, :3].tolist() == [3, 2, 0]

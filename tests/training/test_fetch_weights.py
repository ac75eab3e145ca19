"""Pretrained weights: from every kind of source, checked, mapped, and refused where they are others."""

from __future__ import annotations

import functools
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import backbones
import pytest
import torch
from seaweed import BUCKET, REGION, _weed, seaweed  # noqa: F401
from training_recipes import CONF

from cnn_tuning.config import compose, patch
from cnn_tuning.data.digests import sha256_of
from cnn_tuning.errors import UserError
from cnn_tuning.models.backbone import build_trunk
from cnn_tuning.models.weights import by_order, of_trunk, read_tensors
from cnn_tuning.training import pretrained
from cnn_tuning.training.fit import fit
from cnn_tuning.training.start import first_network, specification_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def web(tmp_path):
    """Serve the folder `web` over HTTP; returns its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "web"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def model_with(path: Path, *uris: str, **changes):
    weights = {"file": path.name, "sha256": sha256_of(path), "sources": [{"uri": uri} for uri in uris]}
    return patch(backbones.recipe_of().model, {"pretrained": True, "weights": weights | changes})


def test_a_hub_gives_the_weights_that_a_training_begins_with(here, web, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", web)
    published = here / "web/timm/tiny/resolve/main/model.safetensors"
    tensors = backbones.save_weights(published)
    model = model_with(published, "file:nowhere/", f"{web.replace('http', 'https', 1)}/", "hub:timm/tiny")
    folder = backbones.fetch(model)
    told = capsys.readouterr()
    assert "from hub:timm/tiny" in told.out
    assert "nowhere/model.safetensors does not exist" in told.err
    data = backbones.pictures(here / "data")
    recipe = patch(backbones.recipe_of(), {"model": json.loads(json.dumps(_plain(model)))})
    network = first_network(specification_of(recipe, data.meta))
    trunk = network.body.trunk.state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in trunk.items())
    assert "fc.weight" not in read_tensors(folder / "weights.safetensors")
    # Of the library, where the recipe does not say.
    assert network.mean.flatten().tolist() == pytest.approx([0.5] * 3)
    assert not list(Path(".sources").rglob("*.safetensors"))


def _plain(model):
    from cnn_tuning.config import to_plain

    return to_plain(model)


def test_the_same_weights_give_the_same_bytes_from_whichever_source(here, web):
    published = here / "web/weights/tiny.pth"
    backbones.save_weights(published)
    first = {}
    for uri in (f"{web}/weights/", f"file:{published.parent}/"):
        folder = backbones.fetch(model_with(published, uri))
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert set(files) == {"weights.safetensors", "source.json"}
        assert files == (first := first or files)


def test_an_object_of_a_private_bucket_gives_the_same_weights(here, seaweed, monkeypatch):  # noqa: F811
    published = here / "weights/tiny.pth"
    backbones.save_weights(published)
    seaweed.put("models/tiny.pth", published.read_bytes())
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    bucket = {"uri": f"s3://{BUCKET}/models/", "region": REGION, "unsigned": False}
    fetched = backbones.fetch(model_with(published, sources=[bucket])) / "weights.safetensors"
    theirs = fetched.read_bytes()
    ours = backbones.fetch(model_with(published, f"file:{published.parent}/")) / "weights.safetensors"
    assert theirs == ours.read_bytes()
    seaweed.put("models/tiny.pth", published.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="hash mismatch"):
        backbones.fetch(model_with(published, sources=[bucket]))


def test_without_pretrained_weights_the_stage_is_quick_and_needs_no_torch(here):
    code = ("import sys; from cnn_tuning.stages.fetch_weights import FetchWeightsConfig, run; "
            "from cnn_tuning.stages.command import Place; from cnn_tuning.config import compose; "
            "from pathlib import Path; "
            f"m = compose(['model=resnet50'], params=None, conf=Path({str(CONF)!r})).model; "
            "run(FetchWeightsConfig(m), Place(Path(), Path())); "
            "print(sorted({'torch', 'timm', 'torchvision'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert [file.name for file in Path("models/pretrained").iterdir()] == ["source.json"]


def test_no_weights_reachable_is_one_error_with_every_reason(here, web, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", web)
    published = here / "web/other/tiny.pth"
    backbones.save_weights(published, seed=1)
    wanted = here / "elsewhere/tiny.pth"
    backbones.save_weights(wanted, seed=2)
    uris = ("file:weights/", "hub:timm/none", f"{web}/other/", "package:nothing_like_it/")
    model = model_with(wanted, *uris)
    with pytest.raises(UserError) as caught:
        backbones.fetch(model)
    lines = str(caught.value).splitlines()
    assert [line.strip().split(": ")[0] for line in lines[1:5]] == [*uris]
    assert "does not exist" in lines[1]
    assert "HTTP 404" in lines[2]
    assert "hash mismatch" in lines[3]
    assert "not installed" in lines[4]
    assert "model.pretrained: false" in lines[5]


def test_a_file_without_a_digest_is_told_its_own(here):
    published = here / "weights/tiny.pth"
    backbones.save_weights(published)
    model = model_with(published, f"file:{published.parent}/", sha256=None)
    with pytest.raises(UserError, match=f"sha256: {sha256_of(published)}"):
        backbones.fetch(model)


def test_a_pickle_that_runs_code_is_refused(here):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    bomb = here / "weights/bomb.pth"
    bomb.parent.mkdir()
    with zipfile.ZipFile(bomb, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    with pytest.raises(UserError, match="more than tensors"):
        backbones.fetch(model_with(bomb, f"file:{bomb.parent}/"))
    assert not Path("exploded").exists()
    (here / "weights/cut.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="no safetensors"):
        read_tensors(here / "weights/cut.safetensors")


def test_tensors_by_order_or_name_must_fit(here):
    tensors = backbones.save_weights(here / "a.pth")
    renamed = {f"their.{number}": tensor for number, tensor in enumerate(tensors.values())}
    from cnn_tuning.models.backbone import original

    reference = original("timm", "test_resnet")
    trunk = build_trunk("timm", "test_resnet", (3, 32, 32), 10)
    again = of_trunk(by_order(renamed, reference), trunk)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())
    assert len(again) == len(tensors) - 2
    # Written before torch counted batches.
    old = {name: tensor for name, tensor in renamed.items() if tensor.ndim}
    assert len(of_trunk(by_order(old, reference), trunk)) < len(again)
    swapped = dict(sorted(renamed.items(), key=lambda item: item[1].ndim))
    with pytest.raises(UserError, match="do not fit in this order"):
        by_order(swapped, reference)
    with pytest.raises(UserError, match="map them by_name"):
        by_order(dict(list(renamed.items())[:5]), reference)
    with pytest.raises(UserError, match="the weights lack conv1"):
        of_trunk(renamed, trunk)


def test_a_training_refuses_weights_that_are_not_the_recipes(here):
    data = backbones.pictures(here / "data", train=12, val=6)
    recipe = backbones.pretrained_recipe(here)
    other = patch(recipe, {"model.weights.sha256": "0" * 64})
    with pytest.raises(UserError, match="run `dvc repro fetch_weights`"):
        fit(other, data, state_folder=here / "s")
    with pytest.raises(UserError, match="test_resnet, not of timm's resnet18"):
        fit(patch(recipe, {"model.arguments.name": "resnet18"}), data, state_folder=here / "s")
    (pretrained.FOLDER / "source.json").unlink()
    with pytest.raises(UserError, match="is missing or damaged"):
        fit(recipe, data, state_folder=here / "s")
    backbones.fetch(patch(recipe, {"model.pretrained": False}).model)
    with pytest.raises(UserError, match="holds no weights"):
        fit(recipe, data, state_folder=here / "s")


def test_inception_takes_published_weights_and_keeps_its_new_auxiliary_layer(here):
    from torchvision.models import inception_v3

    published = here / "weights/inception.pth"
    published.parent.mkdir()
    network = inception_v3(weights=None, init_weights=False, aux_logits=True)
    torch.save(network.state_dict(), published)
    model = compose(["model=inception_v3"], params=None, conf=CONF).model
    weights = {"file": published.name, "sha256": sha256_of(published), "sources": [{"uri": "file:weights/"}]}
    model = patch(model, {"pretrained": True, "weights": weights})
    tensors = read_tensors(backbones.fetch(model) / "weights.safetensors")
    assert {"AuxLogits.conv0.conv.weight", "Mixed_7c.branch1x1.conv.weight"} < set(tensors)
    trunk = build_trunk("torchvision", "inception_v3", (3, 299, 299), 5, auxiliary=True)
    pretrained.load_into(trunk)
    own = network.state_dict()["AuxLogits.conv0.conv.weight"]
    assert torch.equal(trunk.state_dict()["AuxLogits.conv0.conv.weight"], own)
    assert trunk.AuxLogits.fc.out_features == 5


def test_wrong_settings_are_said_when_they_are_composed():
    with pytest.raises(UserError, match=r"only for model.architecture backbone, not compact_cnn"):
        compose(["model=compact_cnn", "model.pretrained=true"], params=None, conf=CONF)
    with pytest.raises(UserError, match=r"trainer.finetune: only for"):
        compose(["model=compact_cnn", "trainer.finetune.trainable=head"], params=None, conf=CONF)
    with pytest.raises(UserError, match=r"trainer.finetune.trainable: .*did you mean 'gradual'"):
        compose(["model=resnet50", "trainer.finetune.trainable=gradua"], params=None, conf=CONF)

"""What every test stands on: one quiet local Ray a run, few threads, checked shapes, no network."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before anything imports torch, ray, deepspeed or a Hugging Face library: they read these once.
os.environ.update(
    {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # tiny products wait longer for a second thread than they take
        "MPLBACKEND": "Agg",
        # Of the object store below, which lets everybody in; and so that no test reaches an account.
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "RAY_DEDUP_LOGS": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as `connect` sets it for a local Ray
    }
)
os.environ.pop("RAY_ADDRESS", None)

from jaxtyping import install_import_hook  # noqa: E402

# Checks every annotated call of the packages with tensors in this process (Ray's workers import them plain), axes
# included. Not the settings: beartype does not take `Self` in a method decorated on its own.
TENSOR_PACKAGES = ("data", "users", "negatives", "objectives", "lm", "ranking", "distributed", "train")
install_import_hook([f"recray.{name}" for name in TENSOR_PACKAGES], "beartype.beartype")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from recray.workspace import Workspace  # noqa: E402

SMALL_ROWS, SMALL_ITEMS = 60, 30

WHOLE = ("tests/cluster/", "tests/stages/")
collect_ignore = ["ways"]  # scripts, which import each other as their own folder's

# A first example may pay for imports and compilation; how long one takes is no fact about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each folder of `WHOLE` in one process of `make test`, elsewhere each file: their tests share fixtures.

    So two processes share the work: while one waits for a node to be taken for dead, the other computes. Not by xdist's
    own groups: 3.8 writes them into the ids of tests, where pytest 9.2 does not look.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in WHOLE if file.startswith(folder)), file)

    return ByFolder(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests on clusters first and those of the stages on the one local Ray second, the longest."""
    places = [*WHOLE, ""]
    items.sort(key=lambda item: next(place for place, folder in enumerate(places) if item.nodeid.startswith(folder)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, started once for all tests that ask for it."""
    import ray
    from ray.data import DataContext

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            configure_logging=True,
            logging_level="ERROR",
            log_to_driver=False,
            object_store_memory=500 * 1024**2,
        )
    DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def recray_data() -> Path:
    """The folder of real logs (ml-latest-small, amazon_games, ...) that RECRAY_DATA names."""
    folder = os.environ.get("RECRAY_DATA")
    if not folder:
        pytest.skip("RECRAY_DATA is not set: the folder that holds ml-latest-small, amazon_games")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"RECRAY_DATA={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The URI of a bucket on a server that speaks S3 over the loopback interface; `{}` stands for a folder's name."""
    import pyarrow.fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"region=us-east-1&scheme=http&endpoint_override={host}%3A{port}"
    s3, _ = pyarrow.fs.FileSystem.from_uri(f"s3://recray?{options}&allow_bucket_creation=true")
    s3.create_dir("recray")
    yield f"s3://recray/{{}}?{options}"
    server.stop()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace that the test owns."""
    return Workspace(str(tmp_path / "workspace"))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, joined examples and item vectors, small enough to align in a second."""
    import numpy as np
    import pyarrow as pa

    from recray import schema
    from recray.data.catalogue import Catalogue
    from recray.data.examples import join_examples, met_in_training, write_shards
    from recray.data.prompts import find_template, training_texts
    from recray.data.tokenizer import train_tokenizer
    from recray.lm.load import make_model, save_model
    from recray.lm.scorer import ItemScorer, score_rows

    path = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    labels = [f"{word} {number}" for number in range(10) for word in ("Fox", "Owl Hill", "Elk")]
    template = find_template("titles")
    tokenizer = train_tokenizer(training_texts(template, labels), 300)
    catalogue = Catalogue.build(labels, tokenizer, template, 96)
    model = make_model(tokenizer, hidden_size=16, layers=2, heads=2, intermediate_size=24, max_positions=256, seed=1)
    save_model(path / "model", model, tokenizer, catalogue)
    rows = list(range(SMALL_ROWS))
    histories = [rng.integers(SMALL_ITEMS, size=rng.integers(1, 8)).tolist() for _ in rows]
    drawn = [rng.permutation(SMALL_ITEMS)[:4] for _ in rows]
    scores = score_rows(
        ItemScorer(model).eval(), catalogue, [np.array(h) for h in histories], drawn, tokens_per_micro_batch=9999
    )
    examples = pa.table([rows, [f"u{r // 2}" for r in rows], histories, [d[0] for d in drawn]], schema=schema.EXAMPLES)
    negatives = pa.table([rows, [d[1:].tolist() for d in drawn]], schema=schema.NEGATIVES)
    reference = pa.table([rows, [d.tolist() for d in drawn], scores], schema=schema.REFERENCE)
    vectors = pa.table([rows, rng.normal(size=(SMALL_ROWS, 6)).tolist()], schema=schema.ROW_VECTORS)
    met = met_in_training(pa.table([[0], ["u0"], [[1, 2]]], schema=schema.HISTORIES), examples)
    write_shards(path / "shards", join_examples(examples, negatives, reference, vectors, met))
    np.save(path / "item_vectors.npy", rng.normal(size=(SMALL_ITEMS, 6)).astype(np.float32))
    return path

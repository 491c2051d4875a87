"""The environment in which a child process compiles for TPUs that are not there."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]

TPU_ENVIRONMENT = {  # one setting serves every chip; it names a slice that this machine pretends to be a host of
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "GRPC_VERBOSITY": "NONE",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process stops at a lock file
}  # fmt: skip

"""Ray's imports warn of what Pydantic will remove: for Ray to mend, not for us to fail on."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

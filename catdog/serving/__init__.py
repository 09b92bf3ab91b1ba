"""Serving: photographs to labels over HTTP, on a page and for programs.

`service` labels by the path of the bulk job (`catdog.labelling`), so that a photograph gets the same `prob_dog` from
both, to the last bit. It knows no protocol: those are in `protocols`, and `app` puts them together. `inline` runs the
application in this process, `ray_serve` in the replicas of a Ray Serve deployment.
"""

from catdog import bundle, ray_session
from catdog.config import ServeConfig
from catdog.serving.record import ServeRecord
from catdog.serving.token import read_token

__all__ = ["ServeRecord", "serve"]


def serve(config: ServeConfig) -> ServeRecord:
    """Serve until the process is told to end (SIGTERM or Ctrl-C), and then until no request is under way.

    Raises:
        UsageError: the port is taken, or the token cannot be used.
        CatdogError: the model cannot be used.
    """
    token = read_token(config)
    is_on_ray = config.executor == "ray" or (
        config.executor == "auto" and ray_session.cluster_address(config.ray_address) is not None
    )
    if is_on_ray:
        from catdog.serving import ray_serve

        return ray_serve.run(config, token)
    from catdog.serving import inline

    return inline.run(config, bundle.load(config.model), token)

"""LitServe with request-level batching: a batch of whole requests runs to its end before the next one starts.

LitServe calls `predict` with the batch and sends the answers when it returns, so a short request waits for the longest
of its batch. Finished images drop out of the engine's calls, which is better than the batches of a diffusers pipeline.
"""

from pathlib import Path
from typing import Any

import litserve
from fastapi import Response

from benchmarks.serving.servers import HOST, engine_of, parser
from benchmarks.serving.workload import Body, program
from dsd_serve.imaging.codec import write_image
from dsd_serve.programs import run_all
from dsd_serve.rows import Pixels


class GenerateAPI(litserve.LitAPI):
    def __init__(self, model: Path, simulated: bool, max_batch_size: int, batch_timeout: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path="/generate")
        self.model, self.simulated = model, simulated

    def setup(self, device: str) -> None:
        self.engine = engine_of("onnx", self.model, self.simulated)

    def predict(self, batch: Any) -> Any:
        """A list of bodies -> a list of images; a single body -> an image if max_batch_size is 1."""
        bodies: list[Body] = batch if isinstance(batch, list) else [batch]
        images = run_all(self.engine, [program(self.engine.config, body) for body in bodies])
        return images if isinstance(batch, list) else images[0]

    def encode_response(self, image: Pixels) -> Response:
        return Response(write_image(image), media_type="image/png")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--max-batch-size", type=int, required=True)
    arguments.add_argument("--batch-timeout", type=float, default=0.005, help="seconds to wait for a batch to fill")
    options = arguments.parse_args()
    api = GenerateAPI(options.model, options.simulated, options.max_batch_size, options.batch_timeout)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=False)
    server.run(host=HOST, port=options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()

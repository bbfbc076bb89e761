"""This project's server: the application that dsd-serve runs, with its own settings."""

import uvicorn

from benchmarks.serving.servers import HOST, engine_of, parser
from server.app import create_app
from server.service import Service
from server.settings import Settings


def main() -> None:
    options = parser(__doc__).parse_args()
    settings = Settings(model=(str(options.model),), host=HOST, port=options.port, log_level="warning")
    service = Service(settings, engine_of("onnx", options.model, options.simulated))
    uvicorn.run(create_app(service), host=HOST, port=options.port, log_level=settings.log_level)


if __name__ == "__main__":
    main()

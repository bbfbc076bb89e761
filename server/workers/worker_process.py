"""The code of an HTTP worker: it leaves signals to its main process at once, and only then loads the application."""

from dsd_serve.backends.process.parent_process import begin
from server.workers.worker_messages import StartWorker


def main() -> None:
    start = begin(StartWorker)
    from server.workers import worker_server

    worker_server.run(start)


if __name__ == "__main__":
    main()

# docker build --target cpu -t dsd:cpu .         serves on the CPU, without torch or a compiler
# docker build --target gpu -t dsd:gpu .         serves on NVIDIA GPUs: CUDA 13, ONNX Runtime, TensorRT
# docker build --target triton -t dsd:triton .   the backend of `dsd-serve --triton`
# docker build --target train -t dsd:train .     dsd-train, dsd-export, torchrun
#
# Every image runs as an unprivileged numeric user and works on a read-only root file system; it writes only to /tmp.

# The base of cpu, gpu and train: any image with Python 3.11 or later and its venv module. A tag can be moved; for
# reproducible builds pass a digest that you have checked, --build-arg BASE=docker.io/library/python@sha256:...
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG TRITON_BASE=nvcr.io/nvidia/tritonserver:26.10-py3


# The installation tools stay in the build stages. Libraries come from locks/, each file by its hash; they are installed
# before the project, so that only a changed lock installs them again.
FROM ${BASE} AS build
WORKDIR /src
COPY locks locks
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/dsd && \
    sh locks/install.sh image /pip/bin/pip install --no-cache-dir

FROM build AS wheel
COPY . .
RUN /pip/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir /wheel .

# One stage for each environment, so that a target builds only its own. The SBOM is in CycloneDX format.
FROM build AS build-cpu
ARG EXTRAS=cpu,otel
RUN sh locks/install.sh "${EXTRAS}" /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir
COPY --from=wheel /wheel /wheel
RUN /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl && \
    mkdir /sbom && /pip/bin/cyclonedx-py environment --output-reproducible -o /sbom/dsd.cdx.json /opt/dsd/bin/python

FROM build AS build-gpu
ARG EXTRAS=gpu,tensorrt,otel
RUN sh locks/install.sh "${EXTRAS}" /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir
COPY --from=wheel /wheel /wheel
RUN /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl && \
    mkdir /sbom && /pip/bin/cyclonedx-py environment --output-reproducible -o /sbom/dsd.cdx.json /opt/dsd/bin/python

FROM build AS build-train
ARG EXTRAS=cpu,train,export
RUN sh locks/install.sh "${EXTRAS}" /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir
COPY --from=wheel /wheel /wheel
RUN /pip/bin/pip --python /opt/dsd/bin/python install --no-cache-dir --no-index --no-deps /wheel/*.whl && \
    mkdir /sbom && /pip/bin/cyclonedx-py environment --output-reproducible -o /sbom/dsd.cdx.json /opt/dsd/bin/python


# Common to cpu and gpu. It has no RUN line, so nothing of the build machine can get in.
FROM ${BASE} AS serving
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dsd-serve" \
      org.opencontainers.image.description="Images from a single network (DSD), served over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/dsd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    DSD_HOST=0.0.0.0 \
    DSD_PORT=8000 \
    DSD_MODEL=/model
# The demo model; mount another model directory over it. Not a VOLUME, because an anonymous one would outlive an update.
COPY dsd_serve/demo /model
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
# dsd-serve drains at SIGTERM for DSD_GRACE seconds (30), longer than Docker's default of 10: use `docker stop -t 40`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', os.environ['DSD_PORT'], timeout=4); c.request('GET', '/health/ready'); a = c.getresponse(); print(a.read().decode()); sys.exit(a.status != 200)"]
ENTRYPOINT ["dsd-serve"]


FROM serving AS cpu
COPY --from=build-cpu /sbom /usr/share/sbom
COPY --from=build-cpu /opt/dsd /opt/dsd


# The CUDA libraries come as wheels with onnxruntime-gpu; the driver comes from the NVIDIA container toolkit.
FROM serving AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    DSD_DEVICE=cuda
COPY --from=build-gpu /sbom /usr/share/sbom
COPY --from=build-gpu /opt/dsd /opt/dsd


# Serves the model repository at /models, written by `dsd-export my-model --triton REPO`.
# docker run --gpus all --shm-size 1g -v ./REPO:/models:ro dsd:triton
# The health check queries the model itself: Triton 24.10 reports ready even when its Python backend process is dead. An
# instance answers each query, in turn, so several are asked: while one of them is ready, so is the container.
FROM ${TRITON_BASE} AS triton
ARG EXTRAS=gpu,tensorrt
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dsd-triton" \
      org.opencontainers.image.description="Triton Inference Server with the engine and the batcher of DSD" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /src
COPY locks locks
COPY --from=wheel /wheel /wheel
# Into Triton's own Python, which its Python backend runs.
RUN sh locks/install.sh "${EXTRAS}" python3 -m pip install --no-cache-dir --break-system-packages && \
    python3 -m pip install --no-cache-dir --break-system-packages --no-index --no-deps /wheel/*.whl && rm -rf /src/*
ENV PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1
WORKDIR /tmp
USER 1000:1000
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=10s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import http.client, json, sys\nfor _ in range(3):\n    c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4)\n    c.request('POST', '/v2/models/dsd/generate', '{\"operation\": \"describe\"}')\n    a = c.getresponse()\n    told = json.load(a)\n    reason = json.loads(bytes(told['text']))['not_ready'] if a.status == 200 else told\n    print(reason or 'ready')\n    if reason is None: sys.exit(0)\nsys.exit(1)"]
ENTRYPOINT ["tritonserver"]
CMD ["--model-repository=/models", "--exit-timeout-secs=30"]


# docker run --gpus all --ipc host -v ./tiny-imagenet-200:/data:ro -v ./runs:/runs --user $(id -u) dsd:train \
#     training/configs/demo.toml data.path=/data data.validation=/data/validation-00000-of-00001.parquet run.dir=/runs/demo
# On a read-only root add --tmpfs /tmp:exec: torch.compile writes and loads its libraries there.
# Many GPUs: --entrypoint torchrun dsd:train --nproc-per-node 8 -m training training/configs/demo.toml ...
FROM ${BASE} AS train
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dsd-train" \
      org.opencontainers.image.description="Trains and exports DSD" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# torch.compile compiles C++ against Python's headers; python:slim has them, Debian's python3 does not.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && \
    { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
      apt-get install -y --no-install-recommends python3-dev; } && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/dsd/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-train /sbom /usr/share/sbom
COPY --from=build-train /opt/dsd /opt/dsd
WORKDIR /work
COPY training/configs training/configs
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["dsd-train"]

# syntax=docker/dockerfile:1.7
# Workers with GPUs: torch with CUDA's libraries, NIXL over RDMA or TCP, and a compiler, which Triton needs when it starts.
# The driver is the node's: the NVIDIA container toolkit mounts it. FlashInfer is left out: it compiles its kernels with
# nvcc when they are first used, and CUDA's compiler is gigabytes. `kernels: flashinfer` needs an image of your own.
#   docker build -f deploy/images/cuda.Dockerfile -t tandem-cuda:0.1.0 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# sha256:... of that image; a release gives it.
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS build
# PyPI's builds of torch are those for the newest CUDA; an index of PyTorch's has those for older drivers.
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] + [r for e in ('engine', 'nixl', 'cuda', 'otel') for r in p['optional-dependencies'][e] if not r.startswith('flashinfer')]))" > requirements.txt \
    && pip install --extra-index-url ${TORCH_INDEX} -r requirements.txt
COPY README.md LICENSE ./
COPY tandem tandem
COPY router router
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY kvtransfer kvtransfer
RUN pip install --no-deps .

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin tandem \
    && install -d -o tandem -g tandem /cache
COPY --from=build /opt/tandem /opt/tandem
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PATH=/opt/tandem/bin:$PATH HOME=/cache XDG_CACHE_HOME=/cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 7600 7601
ENTRYPOINT ["tandem"]
CMD ["decode", "--help"]

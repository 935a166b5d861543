# syntax=docker/dockerfile:1.7
# Workers without GPUs: torch for CPUs, NIXL over TCP or RDMA, and a compiler, because the kernels are compiled once on
# the machine that runs them.
#   docker build -f deploy/images/cpu.Dockerfile -t tandem-cpu:0.1.0 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# sha256:... of that image; a release gives it.
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS build
# Builds of torch for CPUs are gigabytes smaller than those that PyPI has.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] + [r for e in ('engine', 'nixl', 'otel') for r in p['optional-dependencies'][e]]))" > requirements.txt \
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
ENV PATH=/opt/tandem/bin:$PATH HOME=/cache XDG_CACHE_HOME=/cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 7600 7601
ENTRYPOINT ["tandem"]
CMD ["decode", "--help"]

# Image for GPU clusters: NVIDIA's PyTorch image, megatron-core and this package.
#
#   docker build --build-arg PYTORCH_VERSION=26.06 --tag megatron-graft .
#   apptainer build megatron-graft.sif docker-daemon://megatron-graft:latest
#
# Status: linted only. It has never been built, and nothing in it has run on a GPU.
#
# PyTorch, CUDA, NCCL, Transformer Engine and NVIDIA apex are the base image's own builds and are never replaced:
# everything is installed with --no-deps, and only packages the base has no version of are added, at the versions of
# requirements.lock. Nothing is fetched at run time.
ARG PYTORCH_VERSION=26.06

FROM nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3 AS build
# The base holds its own packages in place through PIP_CONSTRAINT; this stage is thrown away and needs ours.
ENV PIP_CONSTRAINT=""
WORKDIR /src
COPY . .
RUN python scripts/lock_requirements.py pins build > build-requirements.txt \
    && python -m pip install --no-cache-dir --no-deps --requirement build-requirements.txt \
    && python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3
WORKDIR /tmp/install
COPY --from=build /wheels ./
COPY requirements.lock ./
COPY scripts/lock_requirements.py scripts/
# The base's own constraints may not hold ours back. The last two lines refuse a base whose versions do not satisfy
# our requirements (`pip check` alone would also complain about the base's own affairs).
RUN python scripts/lock_requirements.py missing build runtime donor > missing.txt \
    && PIP_CONSTRAINT="" python -m pip install --no-cache-dir --no-deps --requirement missing.txt \
    && PIP_CONSTRAINT="" python -m pip install --no-cache-dir --no-deps ./*.whl \
    && python -c "import megatron_graft._native" \
    && { python -m pip check > check.txt || true; } \
    && if grep '^megatron-graft ' check.txt; then exit 1; fi

WORKDIR /workspace
RUN rm -r /tmp/install \
    && useradd --create-home --uid 10001 graft \
    && chown graft /workspace
# Offline, and no writes beside the code: the image also runs read-only and under any user id (Apptainer).
ENV HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
# The base's entry point stays: it runs the command it is given. The example script and its Slurm template are in
# the package's directory, megatron_graft/examples.
CMD ["bash"]

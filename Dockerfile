# Image for GPU clusters: NVIDIA's PyTorch image, megatron-core and this package.
#
#   docker build --build-arg PYTORCH_VERSION=26.06 --tag megatron-graft .
#   apptainer build megatron-graft.sif docker-daemon://megatron-graft:latest
#
# Status: linted, and scripts/install_image.sh, which does what needs no NVIDIA image, is tested in a clean Debian. The
# image itself has never been built, and nothing in it has run on a GPU.
#
# PyTorch, CUDA, NCCL, Transformer Engine and NVIDIA apex are the base image's own builds and are never replaced:
# everything is installed with --no-deps, and only packages the base has no version of are added, at the versions of
# requirements.lock. Nothing is fetched at run time.
ARG PYTORCH_VERSION=26.06

FROM nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3 AS build
# This stage is thrown away, so it may have the build requirements that ours pins.
WORKDIR /src
COPY . .
RUN scripts/install_image.sh wheel . /wheels

FROM nvcr.io/nvidia/pytorch:${PYTORCH_VERSION}-py3
WORKDIR /tmp/install
COPY --from=build /wheels wheels/
COPY requirements.lock ./
COPY scripts/install_image.sh scripts/lock_requirements.py scripts/
RUN scripts/install_image.sh install wheels && scripts/install_image.sh check

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

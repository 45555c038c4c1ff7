# The project for TPU workers on GKE (tpu_scripts/gke), or, with EXTRAS=cuda, for GPUs.
#
#   docker build --tag REGION-docker.pkg.dev/PROJECT/REPOSITORY/flax-distil:TAG .
FROM python:3.12-slim

ARG EXTRAS=tpu,wandb

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

RUN useradd --create-home --uid 1000 distil
WORKDIR /home/distil/flax-distil
COPY --chown=distil . .
RUN pip install --constraint constraints-3.12.txt --editable ".[$EXTRAS]"

USER 1000
CMD ["flax-distil", "--help"]

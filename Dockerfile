# A server on NVIDIA GPUs. docs/operating.md says how to run it.
#
#     docker build --tag taper .
#     docker run --gpus all --publish 50051:50051 --volume taper-programs:/home/taper/.cache/taper taper

FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Some gigabytes, of CUDA for the most part, that stay while the code changes.
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-deps --only-binary :all: --require-hashes --requirement /tmp/requirements.lock

COPY . /tmp/taper
RUN pip install --no-deps --no-build-isolation /tmp/taper && rm -r /tmp/taper /tmp/requirements.lock

# Its own user, who owns the folder of compiled programs and nothing else. The folder is trusted: whoever
# writes to it can run code in the server.
RUN useradd --uid 10001 --user-group --create-home taper \
    && install --directory --owner taper --group taper /home/taper/.cache /home/taper/.cache/taper
COPY deploy/server.toml /etc/taper/server.toml
USER 10001:10001
WORKDIR /home/taper
VOLUME /home/taper/.cache/taper

EXPOSE 50051 9090
STOPSIGNAL SIGTERM

# Loading and compiling take minutes. With TLS, give the probe what clients need (taper-health --help).
HEALTHCHECK --interval=10s --timeout=6s --start-period=15m --retries=3 CMD ["taper-health"]

# What is given to `docker run` after the image counts before the file.
ENTRYPOINT ["taper-serve", "--config", "/etc/taper/server.toml"]

# The runtime with its HTTP server, on the CPU. It runs as a user without rights, on a root file
# system that may be read-only: it writes to /cache and /tmp alone. See docs/deploy.md.
#
#   docker build -t perception_rt .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 perception_rt
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRAS=serve,plm,video,hub
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY perception_rt perception_rt
RUN python -m venv /opt/perception_rt \
 && /opt/perception_rt/bin/pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:${PYTHON}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent \
      --shell /usr/sbin/nologin perception \
 && install -d -o 10001 -g 10001 -m 0700 /cache
COPY --from=build /opt/perception_rt /opt/perception_rt
# /cache keeps copies of the demos and packages from a hub.
ENV PATH=/opt/perception_rt/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_PROGRESS_BARS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD \
  ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["perception-rt"]
CMD ["serve", "demo:pe", "demo:plm", "--host", "0.0.0.0"]

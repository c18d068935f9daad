# The processor with the local model and exact token counts: worker, aggregator and command line in one image.
# Both locks pin every package by hash; a mirror of the package index is named by --build-arg PIP_INDEX_URL=...

FROM python:3.11-slim AS build
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv --without-pip /opt/processor
COPY requirements/build.txt requirements/image.txt requirements/
RUN python -m pip --python /opt/processor/bin/python install --require-hashes -r requirements/image.txt
RUN python -m pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY processor processor
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && python -m pip --python /opt/processor/bin/python install --no-deps --no-index dist/*.whl

FROM python:3.11-slim
RUN python -m pip uninstall --yes --quiet pip setuptools wheel \
 && groupadd --gid 10001 processor \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin processor \
 && install --directory --owner processor --group processor /data
COPY --from=build /opt/processor /opt/processor
ENV PATH=/opt/processor/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    EMBEDDING_AGGREGATOR_STORE=/data/aggregator.sqlite
WORKDIR /data
USER 10001:10001
# Metrics, health and models; listens on loopback unless EMBEDDING_HTTP_HOST says otherwise.
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ.get('EMBEDDING_HTTP_PORT', '8080') + '/health/live', timeout=4)"]
ENTRYPOINT ["embedding-processor"]
CMD ["--help"]

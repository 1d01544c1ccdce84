# Takes the arguments of toxiproxy-server, and listens as shopify/toxiproxy does.
FROM denoland/deno:2.9.6
WORKDIR /app
COPY deno.json main.ts help.txt page.html config.example.yaml ./
USER deno
RUN deno cache main.ts
EXPOSE 8474
HEALTHCHECK --interval=10s --timeout=5s \
  CMD ["deno", "eval", "--no-config", "Deno.exit((await fetch('http://127.0.0.1:8474/health')).ok ? 0 : 1)"]
ENTRYPOINT ["deno", "run", "--cached-only", "--allow-net", "--allow-read", "--allow-write", "/app/main.ts"]
CMD ["-host=0.0.0.0"]

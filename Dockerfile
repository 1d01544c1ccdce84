# Takes the arguments of toxiproxy-server, and listens as shopify/toxiproxy does.
FROM denoland/deno:2.9.6
WORKDIR /app
COPY deno.json main.ts config.example.yaml ./
USER deno
RUN deno cache main.ts
EXPOSE 8474
ENTRYPOINT ["deno", "run", "--cached-only", "--allow-net", "--allow-read", "/app/main.ts"]
CMD ["-host=0.0.0.0"]

/** Draws docs/delays.svg: how the distributions of `latency` spread delays. */

import { beginToxic } from "../main.ts";

const DRAWS = 100_000;
const [LATENCY, JITTER, MOST] = [100, 20, 240]; // in ms; the tail is longer
const COLOURS = { uniform: "#2a78d6", normal: "#1f9e6e", pareto: "#d9822b" };

/** The shares of delays in steps of 2 ms. */
function histogram(distribution: string): number[] {
  const shares = Array<number>(MOST / 2).fill(0);
  let at = 0;
  const active = beginToxic(
    {
      type: "latency",
      attributes: { latency: LATENCY, jitter: JITTER, distribution },
    },
    42,
    {
      pass(timed) {
        const step = Math.floor((timed.at - at) / 2);
        if (step < shares.length) shares[step]! += 1 / DRAWS;
      },
      cut() {},
    },
  );
  const what = new Uint8Array(1);
  for (let i = 0; i < DRAWS; i++, at += 10_000) active.take({ at, what });
  return shares;
}

const x = (ms: number) => 20 + ms * 2.5;

/** A distribution as a row of its own, as high as its largest share. */
function row(name: string, colour: string, top: number): string {
  const shares = histogram(name);
  const most = Math.max(...shares);
  const steps = shares.map((share, i) =>
    `V${(top + 66 - 60 * share / most).toFixed(1)}H${x(2 * i + 2)}`
  );
  const path = `M${x(0)} ${top + 66}${steps.join("")}V${top + 66}`;
  return `  <path d="${path}" fill="${colour}" fill-opacity=".3"` +
    ` stroke="${colour}" stroke-width="1.5"/>\n` +
    `  <text x="${x(170)}" y="${top + 35}" fill="${colour}">${name}</text>`;
}

/** The picture, the same each time. */
export function picture(): string {
  const marks = [0, 40, 80, 100, 120, 160, 200, 240].map((ms) =>
    `  <path d="M${x(ms)} 216v5" stroke="#888"/>\n` +
    `  <text x="${x(ms)}" y="236" fill="#888" text-anchor="middle">${ms}</text>`
  );
  return [
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 262"' +
    ' font-family="sans-serif" font-size="14">',
    `  <title>Delays of 100,000 chunks: latency ${LATENCY}, jitter ${JITTER}` +
    "</title>",
    ...Object.entries(COLOURS).map(([name, colour], i) =>
      row(name, colour, 72 * i)
    ),
    `  <path d="M${x(LATENCY)} 0V216" stroke="#888" stroke-dasharray="4 3"/>`,
    ...marks,
    '  <text x="320" y="257" fill="#888" text-anchor="middle">delay, ms</text>',
    "</svg>\n",
  ].join("\n");
}

if (import.meta.main) {
  const file = new URL("../docs/delays.svg", import.meta.url);
  await Deno.writeTextFile(file, picture());
}

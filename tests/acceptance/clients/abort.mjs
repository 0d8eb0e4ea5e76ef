// A user's script: gives up after two seconds with an AbortController.
// Usage: node abort.mjs BASE_URL THREAD_ID MODEL
const [base, thread, model] = process.argv.slice(2);
const controller = new AbortController();
const began = performance.now();
setTimeout(() => controller.abort(), 2000);

const seen = { chars: 0 };
try {
  const response = await fetch(`${base}/api/threads/${thread}/messages/stream`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-org-id": "acme" },
    body: JSON.stringify({ content: "Hello", model }),
    signal: controller.signal,
  });
  seen.turn_id = response.headers.get("x-turn-id");
  for await (const piece of response.body) seen.chars += piece.length;
  seen.ended = true;
} catch (error) {
  seen.error = error.name;
}
seen.after_ms = performance.now() - began;
console.log(JSON.stringify(seen));

// A user's script: reads a stream with fetch, and cancels its own request after some deltas if told to.
// Usage: node reader.mjs BASE_URL THREAD_ID MODEL [CANCEL_AFTER]
const [base, thread, model, cancelAfter] = process.argv.slice(2);
const headers = { "content-type": "application/json", "x-org-id": "acme" };

const response = await fetch(`${base}/api/threads/${thread}/messages/stream`, {
  method: "POST",
  headers,
  body: JSON.stringify({ content: "Hello", model }),
});
const reader = response.body.getReader();
const decoder = new TextDecoder();
const seen = { status: response.status, text: "", deltas: 0, events: [] };
let buffer = "";

for (;;) {
  const { value, done } = await reader.read();
  if (done) break;
  buffer += decoder.decode(value, { stream: true });
  const blocks = buffer.split("\n\n");
  buffer = blocks.pop();
  for (const block of blocks) {
    const lines = block.split("\n");
    const event = lines.find((line) => line.startsWith("event: ")).slice(7);
    const data = JSON.parse(lines.find((line) => line.startsWith("data: ")).slice(6));
    await take(event, data);
  }
}
console.log(JSON.stringify(seen));

async function take(event, data) {
  seen.events.push(event);
  if (event === "meta") {
    seen.request_id ??= data.request_id;
    if (data.ttft_ms !== undefined) seen.ttft_ms = data.ttft_ms;
  } else if (event === "delta") {
    seen.text += data.delta;
    seen.deltas += 1;
    if (seen.deltas === Number(cancelAfter)) {
      const answer = await fetch(`${base}/api/threads/cancel/${seen.request_id}`, { method: "POST", headers });
      seen.cancel_status = answer.status;
    }
  } else if (event === "done") {
    seen.done = data;
  }
}

// The OpenAI client for Node against a server: prints one JSON document of what it saw.
// Usage: node openai_node.mjs BASE_URL NODE_MODULES PACKAGE            whole answers, streams, tools, errors, leaving
//        node openai_node.mjs BASE_URL NODE_MODULES PACKAGE MODEL MS   waits for MODEL, with a body timeout of MS
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, modules, name, slow, patienceMs] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const { default: OpenAI } = await load(name);

const ask = (model, more = {}) => ({ model, messages: [{ role: "user", content: "hi" }], seed: 7, ...more });
const streamed = { stream: true, stream_options: { include_usage: true } };

async function read(client, body) {
  const seen = { text: "", chunks: 0, ids: [], finish: null, usage: null, extra: null };
  for await (const chunk of await client.chat.completions.create(body)) {
    seen.chunks += 1;
    seen.text += chunk.choices[0]?.delta?.content ?? "";
    seen.finish = chunk.choices[0]?.finish_reason ?? seen.finish;
    seen.usage = chunk.usage ?? seen.usage;
    seen.extra = chunk.citations ?? seen.extra;
    if (!seen.ids.includes(chunk.id)) seen.ids.push(chunk.id);
  }
  return seen;
}

async function wait() {
  const { Agent, fetch } = await load("undici");
  const dispatcher = new Agent({ bodyTimeout: Number(patienceMs), headersTimeout: 120_000 });
  const client = new OpenAI({
    baseURL, apiKey: "sk-any", maxRetries: 0, timeout: 120_000, fetch: (url, init) => fetch(url, { ...init, dispatcher }),
  });
  const [whole, stream] = await Promise.all([
    client.chat.completions.create(ask(slow)),
    read(client, ask(slow, streamed)),
  ]);
  return { whole: whole.choices[0].message.content, stream: stream.text };
}

async function all() {
  const client = new OpenAI({ baseURL, apiKey: "sk-any", maxRetries: 0 });
  const seen = {};

  const [whole, stream, ...burst] = await Promise.all([
    client.chat.completions.create(ask("openai/lat300-n3-citations")).withResponse(),
    read(client, ask("openai/lat300-n3-citations", streamed)),
    ...Array.from({ length: 8 }, () => client.chat.completions.create(ask("openai/lat300-n3-citations"))),
  ]);
  const { data, response } = whole;
  seen.whole = {
    text: data.choices[0].message.content, finish: data.choices[0].finish_reason, usage: data.usage, extra: data.citations,
    request: data._request_id, role: response.headers.get("x-coalesce"), call: response.headers.get("x-call-id"),
  };
  seen.stream = stream;
  seen.burst = burst.map((completion) => completion.choices[0].message.content);

  // The helper throws where a finish reason is missing.
  const helper = await client.chat.completions.stream(ask("openai/n4")).finalChatCompletion();
  seen.helper = helper.choices[0].finish_reason;

  const called = (completion) => completion.choices[0].message.tool_calls.map((call) => [call.function.name, call.function.arguments]);
  seen.tools = called(await client.chat.completions.create(ask("openai/tools")));
  seen.toolsStreamed = called(await client.chat.completions.stream(ask("openai/tools")).finalChatCompletion());

  const named = async (attempt) => attempt().then(() => "none", (error) => [error.constructor.name, error.status ?? null, error.code]);
  seen.errors = {
    model: await named(() => client.chat.completions.create(ask("nobody/x"))),
    invalid: await named(() => client.chat.completions.create(ask("openai/n1", { n: 0 }))),
    provider: await named(() => client.chat.completions.create(ask("openai/err400"))),
    late: await named(() => read(client, ask("openai/n5-cut3", streamed))),
  };
  seen.models = (await client.models.list()).data.map((model) => model.id);

  const leaving = new AbortController();
  const stay = client.chat.completions.create(ask("openai/n500-gap20-left"), { signal: leaving.signal });
  const gone = await client.chat.completions.create(ask("openai/n500-gap20-left", { stream: true }), { signal: leaving.signal });
  seen.left = [];
  // Some versions end the loop, others throw; both have left.
  seen.left.push(await named(async () => { for await (const _ of gone) leaving.abort(); }));
  seen.left.push(await named(() => stay));
  // The last, since nothing is sent to this provider for the next minute.
  seen.errors.limit = await named(() => client.chat.completions.create(ask("openai/err429-retryafter200")));
  return seen;
}

console.log(JSON.stringify(await (slow ? wait() : all())));

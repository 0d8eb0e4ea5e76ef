// The Vercel AI SDK against a server: prints one JSON document of what it saw.
// Usage: node ai_sdk.mjs BASE_URL NODE_MODULES PACKAGE PROVIDER            whole answers, streams, tools, errors, leaving
//        node ai_sdk.mjs BASE_URL NODE_MODULES PACKAGE PROVIDER MODEL MS   waits for MODEL, with a body timeout of MS
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, modules, name, compatible, slow, patienceMs] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateText, jsonSchema, streamText, tool } = await load(name);
const { createOpenAICompatible } = await load(compatible);

const asked = { prompt: "hi", seed: 7, maxRetries: 0 };
const figures = (usage) => [usage.inputTokens, usage.outputTokens, usage.totalTokens];

async function read(model, more = {}) {
  const seen = { text: "", error: null };
  const flow = streamText({ model, ...asked, ...more, onError: ({ error }) => { seen.error = error; } });
  for await (const part of flow.textStream) seen.text += part;
  if (seen.error) throw seen.error;
  const calls = (await flow.toolCalls).map((call) => [call.toolName, call.input]);
  return { ...seen, calls, finish: await flow.finishReason, usage: figures(await flow.usage) };
}

async function wait() {
  const { Agent, fetch } = await load("undici");
  const dispatcher = new Agent({ bodyTimeout: Number(patienceMs), headersTimeout: 120_000 });
  const provider = createOpenAICompatible({
    name: "oncewise", baseURL, apiKey: "sk-any", fetch: (url, init) => fetch(url, { ...init, dispatcher }),
  });
  const [whole, stream] = await Promise.all([
    generateText({ model: provider(slow), ...asked }),
    read(provider(slow)),
  ]);
  return { whole: whole.text, stream: stream.text };
}

async function all() {
  const provider = createOpenAICompatible({ name: "oncewise", baseURL, apiKey: "sk-any", includeUsage: true });
  const seen = {};

  const [whole, stream, ...burst] = await Promise.all([
    generateText({ model: provider("openai/lat300-n3"), ...asked }),
    read(provider("openai/lat300-n3")),
    ...Array.from({ length: 8 }, () => generateText({ model: provider("openai/lat300-n3"), ...asked })),
  ]);
  const { headers } = whole.response;
  seen.whole = {
    text: whole.text, finish: whole.finishReason, usage: figures(whole.usage),
    role: headers["x-coalesce"], call: headers["x-call-id"], request: headers["x-request-id"],
  };
  seen.stream = stream;
  seen.burst = burst.map((answer) => answer.text);

  const inputSchema = jsonSchema({ type: "object", properties: { city: { type: "string" } } });
  const tools = { weather: tool({ description: "The weather of a city.", inputSchema }) };
  const calling = await generateText({ model: provider("openai/tools"), ...asked, tools });
  seen.tools = calling.toolCalls.map((call) => [call.toolName, call.input]);
  seen.toolsStreamed = (await read(provider("openai/tools"), { tools })).calls;

  const named = async (attempt) => attempt().then(() => "none", (error) => [error.name, error.statusCode ?? null, error.isRetryable ?? null]);
  const quietly = (model, more = {}) => generateText({ model: provider(model), ...asked, ...more });
  seen.errors = {
    model: await named(() => quietly("nobody/x")),
    provider: await named(() => quietly("openai/err400")),
    late: await named(() => read(provider("openai/n5-cut3"))),
  };

  const leaving = new AbortController();
  const stay = quietly("openai/n500-gap20-left", { abortSignal: leaving.signal });
  const gone = streamText({ model: provider("openai/n500-gap20-left"), ...asked, abortSignal: leaving.signal, onError: () => {} });
  seen.left = [];
  // Some versions end the loop, others throw; both have left.
  seen.left.push(await named(async () => { for await (const _ of gone.textStream) leaving.abort(); }));
  seen.left.push(await named(() => stay));
  // The last, since nothing is sent to this provider for the next minute.
  seen.errors.limit = await named(() => quietly("openai/err429-retryafter200"));
  return seen;
}

console.log(JSON.stringify(await (slow ? wait() : all())));

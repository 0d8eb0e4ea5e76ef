// The OpenAI client for Node and the Vercel AI SDK against a server: prints one JSON document of what they saw.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [baseURL, modules] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const { default: OpenAI } = await load("openai");
const { generateText, streamText } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const client = new OpenAI({ baseURL, apiKey: "sk-any", maxRetries: 0 });
const ask = (model, more = {}) => ({ model, messages: [{ role: "user", content: "hi" }], temperature: 0, ...more });
const seen = {};

const whole = await client.chat.completions.create(ask("openai/n3"));
seen.whole = { length: whole.choices[0].message.content.length, finish: whole.choices[0].finish_reason, usage: whole.usage };

seen.stream = { chunks: 0, usage: null };
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(ask("openai/lat300-n3", options))) {
  seen.stream.chunks += 1;
  seen.stream.usage = chunk.usage ?? seen.stream.usage;
}

// The helper throws where a finish reason is missing.
const final = await client.chat.completions.stream(ask("openai/n4")).finalChatCompletion();
seen.helper = final.choices[0].finish_reason;

const tools = await client.chat.completions.stream(ask("openai/tools")).finalChatCompletion();
seen.tools = tools.choices[0].message.tool_calls.map((call) => [call.function.name, call.function.arguments]);

const named = async (attempt) => attempt().then(() => "none", (error) => [error.constructor.name, error.status ?? null, error.code]);
seen.badModel = await named(() => client.chat.completions.create(ask("nobody/x")));
seen.invalid = await named(() => client.chat.completions.create(ask("openai/n1", { n: 0 })));
seen.provider = await named(() => client.chat.completions.create(ask("openai/err400")));
seen.late = await named(async () => {
  for await (const _ of await client.chat.completions.create(ask("openai/n5-cut3", { stream: true }))) { /* read on */ }
});
const leaving = new AbortController();
seen.aborted = await named(async () => {
  const stream = await client.chat.completions.create(ask("openai/n500-gap20", { stream: true }), { signal: leaving.signal });
  for await (const _ of stream) leaving.abort();
});
seen.models = (await client.models.list()).data.length;

const provider = createOpenAICompatible({ name: "oncewise", baseURL, apiKey: "sk-any", includeUsage: true });
const asked = { prompt: "hi", temperature: 0, maxRetries: 0 };
const text = await generateText({ model: provider("openai/n5"), ...asked });
seen.ai = { length: text.text.length, finish: text.finishReason, tokens: text.usage.outputTokens };
const flow = streamText({ model: provider("openai/lat300-n6"), ...asked });
let length = 0;
for await (const part of flow.textStream) length += part.length;
seen.aiStream = { length, finish: await flow.finishReason, tokens: (await flow.usage).outputTokens };

console.log(JSON.stringify(seen));

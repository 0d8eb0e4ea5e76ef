-- Book the next start by the generic cell rate algorithm (ITU-T I.371), in microseconds of the server's clock.
-- Returns how long it is until the start, and the state that this booking leaves, by which it may be given back.
-- KEYS: when the bucket is full again; the latest starts, newest first.
-- ARGV: the spacing of starts, the slack that a burst may use, starts that a second may have (0: any), a second.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local spacing, slack, window = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local free = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0))
local start = math.max(now, free - slack)
local state = string.format('%.0f', free + spacing)
local keep_ms = math.ceil((free + spacing - now) / 1000) + 60000
if window > 0 then
  local oldest = redis.call('LINDEX', KEYS[2], window - 1)
  if oldest then
    start = math.max(start, oldest + ARGV[4])
  end
  redis.call('LPUSH', KEYS[2], string.format('%.0f', start))
  redis.call('LTRIM', KEYS[2], 0, window - 1)
  redis.call('PEXPIRE', KEYS[2], keep_ms)
end
redis.call('SET', KEYS[1], state, 'PX', keep_ms)
return {start - now, state}

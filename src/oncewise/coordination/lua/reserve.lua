-- Book the next start by the generic cell rate algorithm (ITU-T I.371), in microseconds of the server's clock.
-- Returns how long it is until the start, and the state that this booking leaves, by which it may be given back.
-- KEYS: when the bucket is full again. ARGV: the spacing of starts, the slack that a burst may use.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local spacing, slack = tonumber(ARGV[1]), tonumber(ARGV[2])
local free = math.max(now, tonumber(redis.call('GET', KEYS[1]) or 0))
local start = math.max(now, free - slack)
local state = string.format('%.0f', free + spacing)
redis.call('SET', KEYS[1], state, 'PX', math.ceil((free + spacing - now) / 1000) + 60000)
return {start - now, state}

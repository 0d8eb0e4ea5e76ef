-- Let no start be booked for a while, and none together at its end. KEYS: when the bucket is full again.
-- ARGV: the pause, the slack, both in microseconds.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local free = tonumber(redis.call('GET', KEYS[1]) or 0)
local until_free = now + ARGV[1] + ARGV[2]
if free < until_free then
  redis.call('SET', KEYS[1], string.format('%.0f', until_free), 'PX', math.ceil((until_free - now) / 1000) + 60000)
end
return 1

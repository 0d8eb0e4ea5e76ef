-- Take a slot. Returns 0 if it is taken, else for how many milliseconds to wait at most before asking again.
-- KEYS: the slots, each with the time in microseconds at which it lapses; the workers that wait.
-- ARGV: the limit, the new slot's name, its lease in ms, this worker.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local lease = ARGV[3] * 1000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
if redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[1]) then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + lease), ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('ZREM', KEYS[2], ARGV[4])
  return 0
end
redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', now), ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return math.max(1, math.ceil((first[2] - now) / 1000))

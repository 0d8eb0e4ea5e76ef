-- Keep slots for longer; one that was lost with the server's memory is taken again, since its call runs.
-- KEYS: the slots. ARGV: the lease in ms, the names.
local t = redis.call('TIME')
local until_us = string.format('%.0f', t[1] * 1000000 + t[2] + ARGV[1] * 1000)
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], until_us, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1

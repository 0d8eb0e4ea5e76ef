-- Give the latest booking back. KEYS: as in reserve.lua. ARGV: the state it left, the spacing.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], string.format('%.0f', ARGV[1] - ARGV[2]), 'KEEPTTL')
  redis.call('LPOP', KEYS[2])
  return 1
end
return 0

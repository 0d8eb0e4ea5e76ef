-- Keep a claim for longer, if it is this holder's. KEYS: the claim. ARGV: the holder, milliseconds from now.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 0

-- Add an entry to a log if it begins where the log ends, or if it begins a higher epoch. Returns where the log ends.
-- The stream alone says that: a second key could be evicted, and whoever was fenced would write again.
-- KEYS: the stream. ARGV: epoch, deltas before the entry, position of its last event, the entry, milliseconds to keep.
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local e, s = string.match(last and last[1] or '0-0', '(%d+)-(%d+)')
e, s = tonumber(e), tonumber(s)
local epoch, after, seq = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local begins = epoch > e and after == 0
if seq > after and (begins or (epoch == e and after == s)) then
  if begins then
    -- Whoever comes later starts at the attempt that counts.
    redis.call('DEL', KEYS[1])
  end
  redis.call('XADD', KEYS[1], ARGV[1] .. '-' .. ARGV[3], 'e', ARGV[4])
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
  e, s = epoch, seq
end
return {e, s}

-- Add an entry to a log if it begins where the log ends, or if it begins a higher epoch. Returns where the log ends.
-- KEYS: the stream; its end, as `epoch-seq`.
-- ARGV: epoch, deltas before the entry, position of its last event, the entry, milliseconds to keep the log.
local e, s = string.match(redis.call('GET', KEYS[2]) or '0-0', '(%d+)-(%d+)')
e, s = tonumber(e), tonumber(s)
local epoch, after, seq, keep_ms = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[5])
if e > 0 and redis.call('EXISTS', KEYS[1]) == 0 then
  e, s = 0, 0
end
local begins = epoch > e and after == 0
if seq > after and (begins or (epoch == e and after == s)) then
  if begins then
    -- Whoever comes later starts at the attempt that counts.
    redis.call('DEL', KEYS[1])
  end
  -- The stream itself refuses what is not beyond its last entry, should the two keys ever disagree.
  redis.call('XADD', KEYS[1], ARGV[1] .. '-' .. ARGV[3], 'e', ARGV[4])
  redis.call('SET', KEYS[2], ARGV[1] .. '-' .. ARGV[3], 'PX', keep_ms)
  redis.call('PEXPIRE', KEYS[1], keep_ms)
  e, s = epoch, seq
end
return {e, s}

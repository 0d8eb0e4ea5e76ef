-- Give a slot back and tell the worker that waits longest.
-- KEYS: the slots; the workers that wait. ARGV: the slot's name, prefix of inboxes, the word to say, entries and
-- milliseconds to keep.
redis.call('ZREM', KEYS[1], ARGV[1])
local waiting = redis.call('ZPOPMIN', KEYS[2])
if waiting[1] then
  local inbox = ARGV[2] .. waiting[1]
  redis.call('XADD', inbox, 'MAXLEN', '~', ARGV[4], '*', 's', ARGV[3])
  redis.call('PEXPIRE', inbox, ARGV[5])
end
return 1

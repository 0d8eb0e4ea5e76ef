-- Put a word into a stream that lives on for a while, so that whoever listens there may be away for a moment.
-- KEYS: the stream. ARGV: the word, entries to keep, milliseconds to keep it.
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 's', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1

/** The Redis of a fleet, for the commands that use one. */

import type { Command } from "commander";
import { OptionError } from "../errors.js";
import { checkUrl } from "../fleet/redis.js";

/** What commander makes of the flag: true without an address. */
export type RedisFlag = string | boolean | undefined;

/** Adds `--redis`. @param description what it is to the command */
export function addRedisFlag(command: Command, description: string): Command {
  return command.option(
    "--redis [url]",
    `${description}, such as redis://127.0.0.1:6379, or rediss://user:password@host:6380 with TLS (default: FLOWTURBO_REDIS, which other users of this machine cannot read)`,
  );
}

/** @throws OptionError without an address, or for what is none */
export function redisOf(flag: RedisFlag): string {
  const url = typeof flag === "string" ? flag : process.env.FLOWTURBO_REDIS;
  if (!url)
    throw new OptionError(
      "redis",
      "Expected the address of the fleet's Redis: give --redis <url>, or set FLOWTURBO_REDIS.",
    );
  try {
    checkUrl(url);
  } catch (cause) {
    // It may hold a password.
    throw new OptionError(
      "redis",
      "Expected the address of a Redis such as redis://127.0.0.1:6379 or rediss://user:password@host:6380 for --redis or FLOWTURBO_REDIS.",
      { cause },
    );
  }
  return url;
}

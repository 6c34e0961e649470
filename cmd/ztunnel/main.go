// Command ztunnel is the node proxy. It is configured by environment variables, those of Istio's ztunnel.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/fairlead-mesh/fairlead/internal/accesslog"
	"github.com/fairlead-mesh/fairlead/ztunnel"
)

// version is set by the build (-ldflags -X main.version=…).
var version = "dev"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "ztunnel:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg, err := ztunnel.ConfigFromEnv(os.Getenv)
	if err != nil {
		return err
	}
	level, err := parseLevel(cfg.LogLevel)
	if err != nil {
		return err
	}
	format := zap.NewProductionEncoderConfig()
	format.TimeKey, format.EncodeTime = "time", zapcore.ISO8601TimeEncoder
	format.MessageKey, format.NameKey = "message", "scope"
	process := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(format), zapcore.Lock(os.Stderr), level))
	access, stop := accesslog.Open(os.Stdout, level, zapcore.NewJSONEncoder(format))
	defer stop()

	process.Info("starting", zap.String("version", version), zap.String("node", cfg.NodeName))
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	return ztunnel.Run(ctx, cfg, ztunnel.Log{Process: process, Level: level, Access: access})
}

// parseLevel takes "info", or the first level of a Rust filter such as "info,proxy=debug".
func parseLevel(text string) (zap.AtomicLevel, error) {
	for part := range strings.SplitSeq(text, ",") {
		if strings.Contains(part, "=") {
			continue
		}
		if part == "trace" {
			part = "debug"
		}
		level, err := zap.ParseAtomicLevel(part)
		if err != nil {
			return level, fmt.Errorf("log level %q: %w", text, err)
		}
		return level, nil
	}
	return zap.NewAtomicLevel(), nil
}

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// envoy starts an Envoy in each pod of a lane, as an HBONE client and server, with the identities that a mesh would give
// and as many threads as there are CPUs.
func envoy(ctx context.Context, l *lane, binary string, threads int) error {
	authority, err := identity.NewSelfSigned(mesh.DefaultTrustDomain, 0)
	if err != nil {
		return err
	}
	for _, r := range roles {
		p := l.pods[r]
		id := mesh.Identity{TrustDomain: mesh.DefaultTrustDomain, Namespace: "default", ServiceAccount: string(r)}
		file, err := lab.EnvoyConfig(ctx, l.dir, "envoy-"+string(r), authority, id)
		if err != nil {
			return fmt.Errorf("configure Envoy: %w", err)
		}
		if err := istioRules(p.ns); err != nil {
			return err
		}
		own, err := l.group.child("envoy-" + string(r))
		if err != nil {
			return err
		}
		started, err := command{
			name: "envoy in " + string(r), ns: p.ns, group: own, spawn: l.spawn, log: filepath.Join(l.dir, "envoy-"+string(r)+".log"),
			argv: []string{binary, "-c", file, "--concurrency", strconv.Itoa(threads), "--disable-hot-restart", "--log-level", "warning"},
		}.start()
		if err != nil {
			return err
		}
		l.close = append(l.close, func() error { started.stop(); return nil })
		l.proxies = append(l.proxies, &proxy{process: started, pods: []role{r}})
		if err := awaitReady(ctx, started, "http://127.0.0.1:15000/ready"); err != nil {
			return err
		}
	}
	return nil
}

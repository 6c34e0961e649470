package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// demo plays the scenes and collects a row for each call.
type demo struct {
	w        *lab.World
	progress func(string, ...any)
	rows     []row

	web, batch, cart, legacy, v1, v2 *lab.Pod
	gate                             *lab.Pod // the waypoint
	orders                           *lab.Service
}

const (
	shop    = "shop"
	outside = "outside"
)

var ambient = map[string]string{"istio.io/dataplane-mode": "ambient"}

// play runs the scenes in order; each builds on the one before.
func (d *demo) play(ctx context.Context) error {
	for _, scene := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"before: pods and services, and a mesh that nobody uses yet", d.before},
		{"the namespace gets the label istio.io/dataplane-mode=ambient; no pod is restarted", d.label},
		{"an AuthorizationPolicy denies the service account batch", d.deny},
		{"PeerAuthentication: first permissive, then STRICT", d.strict},
		{"a waypoint for the namespace, 90/10 by HTTPRoute, only GET is allowed", d.waypoint},
		{"ztunnel of node1 is killed with SIGKILL", d.kill},
	} {
		d.progress("— %s", scene.title)
		if err := scene.play(ctx); err != nil {
			return fmt.Errorf("%s: %w", scene.title, err)
		}
	}
	return nil
}

// before starts everything without the label, and shows that calls are readable: the control of all that follows.
func (d *demo) before(ctx context.Context) error {
	if err := d.w.StartMesh(ctx); err != nil {
		return err
	}
	if err := errors.Join(d.w.Namespace(shop, nil), d.w.Namespace(outside, nil)); err != nil {
		return err
	}
	for _, p := range []struct {
		pod     **lab.Pod
		spec    lab.PodSpec
		version string
	}{
		{pod: &d.web, spec: lab.PodSpec{Namespace: shop, Name: "web", Node: 0}},
		{pod: &d.batch, spec: lab.PodSpec{Namespace: shop, Name: "batch", Node: 0}},
		{pod: &d.cart, spec: lab.PodSpec{Namespace: shop, Name: "cart", Node: 0}},
		{pod: &d.legacy, spec: lab.PodSpec{Namespace: outside, Name: "legacy", Node: 0}},
		{pod: &d.v1, spec: lab.PodSpec{Namespace: shop, Name: "orders-v1", ServiceAccount: "orders", Node: 1}, version: "v1"},
		{pod: &d.v2, spec: lab.PodSpec{Namespace: shop, Name: "orders-v2", ServiceAccount: "orders", Node: 1}, version: "v2"},
	} {
		if p.spec.ServiceAccount == "" {
			p.spec.ServiceAccount = p.spec.Name
		}
		p.spec.Labels = map[string]string{"app": p.spec.ServiceAccount}
		if p.version != "" {
			p.spec.Labels["version"] = p.version
		}
		var err error
		if *p.pod, err = d.w.Pod(ctx, p.spec); err != nil {
			return err
		}
	}
	var err error
	if d.orders, err = d.w.Service(lab.ServiceSpec{Namespace: shop, Name: "orders", Selector: map[string]string{"app": "orders"}}); err != nil {
		return err
	}
	for _, v := range []string{"v1", "v2"} {
		_, err := d.w.Service(lab.ServiceSpec{Namespace: shop, Name: "orders-" + v, Selector: map[string]string{"app": "orders", "version": v}})
		if err != nil {
			return err
		}
	}
	plain := expectation{path: pathPlain, readable: true}
	return d.all(
		func() error { return d.call(ctx, "before", d.web, d.v1, toPod, plain) },
		func() error { return d.call(ctx, "before", d.web, d.v1, toPod6, plain) },
	)
}

// label puts the running pods into the mesh.
func (d *demo) label(ctx context.Context) error {
	pid := d.v1.PID()
	if err := d.w.Namespace(shop, ambient); err != nil {
		return err
	}
	start := time.Now()
	if err := d.enrolled(ctx, d.web, d.batch, d.cart, d.v1, d.v2); err != nil {
		return err
	}
	d.progress("five running pods are in the mesh %d ms after the label; their processes are the same (%s: pid %d)",
		time.Since(start).Milliseconds(), d.v1.Name, pid)
	tunnel := expectation{path: pathHBONE, lines: 2}
	if err := d.until(ctx, "calls go through the tunnel", d.web, d.v1, answered); err != nil {
		return err
	}
	return d.all(
		func() error { return d.call(ctx, "label", d.web, d.v1, toPod, tunnel) },
		func() error { return d.call(ctx, "label", d.web, d.v1, toPod6, tunnel) },
		func() error { return d.call(ctx, "label", d.batch, d.v1, toPod, tunnel) },
		func() error { return d.callService(ctx, "label", d.web, tunnel) },
		func() error { return d.call(ctx, "label", d.web, d.cart, toPod, expectation{path: pathNode, lines: 2}) },
	)
}

const denyBatch = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: deny-batch}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/batch]}}]
`

// deny refuses one service account and nobody else.
func (d *demo) deny(ctx context.Context) error {
	if err := d.w.Apply("deny-batch", denyBatch); err != nil {
		return err
	}
	if err := d.until(ctx, "the policy is in force", d.batch, d.v1, lab.Answer.Failed); err != nil {
		return err
	}
	err := d.all(
		func() error {
			return d.call(ctx, "deny", d.batch, d.v1, toPod, expectation{path: pathHBONE, lines: 2, deniedBy: "shop/deny-batch"})
		},
		func() error { return d.call(ctx, "deny", d.web, d.v1, toPod, expectation{path: pathHBONE, lines: 2}) },
	)
	return errors.Join(err, d.w.Delete("deny-batch"))
}

const strictMode = `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: shop, name: default}
spec:
  mtls: {mode: STRICT}
`

// strict lets a pod outside the mesh in, and then not any more.
func (d *demo) strict(ctx context.Context) error {
	permissive := expectation{path: pathPlain, lines: 1, readable: true}
	if err := d.call(ctx, "permissive", d.legacy, d.v1, toPod, permissive); err != nil {
		return err
	}
	if err := d.w.Apply("strict", strictMode); err != nil {
		return err
	}
	if err := d.until(ctx, "STRICT is in force", d.legacy, d.v1, lab.Answer.Failed); err != nil {
		return err
	}
	return d.all(
		// What the pod outside sends before it is refused is its own affair; the mesh cannot make it unreadable.
		func() error {
			return d.call(ctx, "STRICT", d.legacy, d.v1, toPod, expectation{path: pathPlain, lines: 1, deniedBy: anyPolicy, readable: true})
		},
		func() error { return d.call(ctx, "STRICT", d.web, d.v1, toPod, expectation{path: pathHBONE, lines: 2}) },
	)
}

const splitRoute = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: orders}
spec:
  parentRefs: [{group: "", kind: Service, name: orders, port: 80}]
  rules:
  - backendRefs:
    - {name: orders-v1, port: 80, weight: 90}
    - {name: orders-v2, port: 80, weight: 10}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: only-get}
spec:
  targetRefs: [{group: "", kind: Service, name: orders}]
  action: ALLOW
  rules:
  - to: [{operation: {methods: [GET]}}]
`

// waypoint routes and authorizes requests.
func (d *demo) waypoint(ctx context.Context) error {
	if err := d.w.Apply("orders-route", splitRoute); err != nil {
		return err
	}
	var err error
	if d.gate, err = d.w.Waypoint(ctx, shop, "waypoint", 0); err != nil {
		return err
	}
	labels := map[string]string{"istio.io/use-waypoint": "waypoint"}
	for k, v := range ambient {
		labels[k] = v
	}
	if err := d.w.Namespace(shop, labels); err != nil {
		return err
	}
	post := lab.Call{To: d.orders.Addr(lab.ServicePortHTTP, false), HTTP: true, Method: "POST"}
	took, err := d.w.Until(ctx, d.web, post, func(a lab.Answer) bool { return a.Last().Status == 403 })
	if err != nil {
		return fmt.Errorf("wait until the waypoint is in the path: %w", err)
	}
	d.progress("the waypoint is in the path after %d ms", took.Milliseconds())
	return d.all(
		func() error { return d.callWaypoint(ctx, "GET", 1000) },
		func() error { return d.callWaypoint(ctx, "POST", 1) },
	)
}

// kill shows that without ztunnel nothing leaves in clear, and that it comes back.
func (d *demo) kill(ctx context.Context) error {
	node := d.w.Nodes[0]
	node.KillZtunnel()
	refused := expectation{path: pathNone, refused: true}
	if err := d.call(ctx, "ztunnel dead", d.web, d.v1, toPod, refused); err != nil {
		return err
	}
	start := time.Now()
	if err := node.StartZtunnel(ctx); err != nil {
		return err
	}
	if err := d.until(ctx, "new connections work again", d.web, d.v1, answered); err != nil {
		return err
	}
	d.progress("back %d ms after ztunnel was started again", time.Since(start).Milliseconds())
	return d.call(ctx, "ztunnel back", d.web, d.v1, toPod, expectation{path: pathHBONE, lines: 2})
}

func (d *demo) all(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func answered(a lab.Answer) bool { return a.OK() }

// enrolled waits until all pods are in the mesh.
func (d *demo) enrolled(ctx context.Context, pods ...*lab.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, p := range pods {
		for !p.Enrolled(ctx) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("pod %s was not enrolled: %w", p.Name, ctx.Err())
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return nil
}

// until waits for a change to be in force and says how long that took.
func (d *demo) until(ctx context.Context, what string, from, to *lab.Pod, wanted func(lab.Answer) bool) error {
	took, err := d.w.Until(ctx, from, lab.Call{To: to.Addr(lab.PortTCP, false), Size: 100}, wanted)
	if err != nil {
		return fmt.Errorf("wait until %s: %w", what, err)
	}
	d.progress("%s after %d ms", what, took.Milliseconds())
	return nil
}

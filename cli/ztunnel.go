package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The parts of a node proxy's /config_dump that tables show.
type (
	proxyWorkload struct {
		UID         string   `json:"uid"`
		Name        string   `json:"name"`
		Namespace   string   `json:"namespace"`
		WorkloadIPs []string `json:"workloadIps"`
		Node        string   `json:"node"`
		Protocol    string   `json:"protocol"`
		Waypoint    *struct {
			Destination string `json:"destination"`
		} `json:"waypoint"`
	}
	proxyService struct {
		Name      string         `json:"name"`
		Namespace string         `json:"namespace"`
		VIPs      []string       `json:"vips"`
		Endpoints map[string]any `json:"endpoints"`
		Waypoint  *struct {
			Destination string `json:"destination"`
		} `json:"waypoint"`
	}
	proxyPolicy struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		Scope     string `json:"scope"`
		Action    string `json:"action"`
		DryRun    bool   `json:"dryRun"`
		Rules     []any  `json:"rules"`
	}
	proxyCertificates struct {
		Identity  string `json:"identity"`
		State     string `json:"state"`
		CertChain []struct {
			SerialNumber   string `json:"serialNumber"`
			ValidFrom      string `json:"validFrom"`
			ExpirationTime string `json:"expirationTime"`
		} `json:"certChain"`
	}
	proxyPod struct {
		Info struct {
			Name      string `json:"name"`
			Namespace string `json:"namespace"`
		} `json:"info"`
		Connections struct {
			Inbound  []proxyConnection `json:"inbound"`
			Outbound []proxyConnection `json:"outbound"`
		} `json:"connections"`
	}
	proxyConnection struct {
		Src         string `json:"src"`
		OriginalDst string `json:"originalDst"`
		ActualDst   string `json:"actualDst"`
		Protocol    string `json:"protocol"`
		Identity    string `json:"identity"`
		Sent        int64  `json:"bytesSent"`
		Received    int64  `json:"bytesRecv"`
		Age         string `json:"age"`
	}
	proxyDump struct {
		Workloads    []proxyWorkload     `json:"workloads"`
		Services     []proxyService      `json:"services"`
		Policies     []proxyPolicy       `json:"policies"`
		Certificates []proxyCertificates `json:"certificates"`
		Pods         map[string]proxyPod `json:"workloadState"`
	}
)

// view is one subcommand: a part of the dump, and its table. all tells whether rows of every namespace are wanted.
type view struct {
	name, short string
	aliases     []string
	key         string
	rows        func(d *proxyDump, want func(namespace string) bool) table
}

var views = []view{
	{"workloads", "Pods and other workloads the proxy knows", []string{"workload", "w"}, "workloads", workloadRows},
	{"services", "Services, their addresses and endpoints", []string{"service", "svc", "s"}, "services", serviceRows},
	{"policies", "Authorization policies in force", []string{"policy", "pol"}, "policies", policyRows},
	{"certificates", "Certificates of the node's pods", []string{"certificate", "certs", "cert"}, "certificates", certificateRows},
	{"connections", "Connections open at this moment", []string{"connection", "conns"}, "workloadState", connectionRows},
}

func (s *session) ztunnelConfig() *cobra.Command {
	c := &cobra.Command{
		Use:     "ztunnel-config",
		Aliases: []string{"zc"},
		Args:    cobra.NoArgs, // a misspelt part is an error
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
		Short:   "Show what a node proxy knows",
		Example: `  fairlead ztunnel-config workloads
  fairlead ztunnel-config certificates --node node1
  fairlead ztunnel-config policies -n shop -o yaml`,
	}
	for _, v := range views {
		c.AddCommand(s.ztunnelView(v))
	}
	return c
}

func (s *session) ztunnelView(v view) *cobra.Command {
	var node string
	c := &cobra.Command{
		Use:     v.name + " [ZTUNNEL-POD]",
		Aliases: v.aliases,
		Short:   v.short,
		Example: fmt.Sprintf("  fairlead ztunnel-config %[1]s\n  fairlead ztunnel-config %[1]s --node node1 -o json", v.name),
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			pod := ""
			if len(args) == 1 {
				pod = args[0]
			}
			raw, err := s.proxyDump(cmd.Context(), pod, node)
			if err != nil {
				return err
			}
			return s.show(raw, v)
		},
	}
	s.outputFlag(c)
	c.Flags().StringVar(&node, "node", "", "the proxy of this node (default: any)")
	return c
}

// show prints one part of a dump; -n, when given, keeps what is of that namespace.
func (s *session) show(raw []byte, v view) error {
	var parts map[string]json.RawMessage
	var d proxyDump
	if err := json.Unmarshal(raw, &parts); err != nil {
		return fmt.Errorf("read the proxy's dump: %w", err)
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return fmt.Errorf("read the proxy's dump: %w", err)
	}
	var part any
	if err := json.Unmarshal(parts[v.key], &part); err != nil {
		return fmt.Errorf("read %s of the proxy's dump: %w", v.key, err)
	}
	want := func(namespace string) bool { return s.namespace == "" || s.namespace == namespace }
	return s.print(keep(part, want), v.rows(&d, want))
}

// keep leaves out of a part of the dump what is of unwanted namespaces. A part is a list, or a map by uid.
func keep(part any, want func(namespace string) bool) any {
	switch part := part.(type) {
	case []any:
		return slices.DeleteFunc(part, func(v any) bool { return !want(namespaceOf(v)) })
	case map[string]any:
		maps.DeleteFunc(part, func(_ string, v any) bool { return !want(namespaceOf(v)) })
	}
	return part
}

// namespaceOf is the namespace that an object of the dump says it is of, by itself, by its pod or by its identity.
func namespaceOf(v any) string {
	object, _ := v.(map[string]any)
	if info, ok := object["info"].(map[string]any); ok {
		object = info
	}
	if identity, ok := object["identity"].(string); ok {
		return identityNamespace(identity)
	}
	namespace, _ := object["namespace"].(string)
	return namespace
}

// identityNamespace is ns of spiffe://trust-domain/ns/NS/sa/SA.
func identityNamespace(identity string) string {
	if parts := strings.Split(identity, "/"); len(parts) > 4 {
		return parts[4]
	}
	return ""
}

// proxyDump asks one node proxy: the named pod, that of a node, or any that runs.
func (s *session) proxyDump(ctx context.Context, pod, node string) ([]byte, error) {
	k, err := s.connect()
	if err != nil {
		return nil, err
	}
	if pod == "" {
		selector := metav1.ListOptions{LabelSelector: "app=ztunnel", FieldSelector: "status.phase=Running"}
		if node != "" {
			selector.FieldSelector += ",spec.nodeName=" + node
		}
		list, err := k.kubernetes.CoreV1().Pods(s.system).List(ctx, selector)
		if err != nil {
			return nil, fmt.Errorf("look for node proxies in %s: %w", s.system, err)
		}
		if len(list.Items) == 0 {
			where := "in namespace " + s.system
			if node != "" {
				where = "on node " + node
			}
			return nil, fmt.Errorf("no running ztunnel %s: is Fairlead installed there? `kubectl get pods -n %s` shows what is", where, s.system)
		}
		pod = list.Items[0].Name
	}
	return k.get(ctx, s.system, pod, "/config_dump")
}

func workloadRows(d *proxyDump, want func(string) bool) table {
	t := table{header: []string{"NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"}}
	for _, w := range d.Workloads {
		if !want(w.Namespace) {
			continue
		}
		waypoint := "None"
		if w.Waypoint != nil {
			waypoint = w.Waypoint.Destination
		}
		t.rows = append(t.rows, []string{w.Namespace, w.Name, dash(strings.Join(w.WorkloadIPs, ",")), dash(w.Node), waypoint, w.Protocol})
	}
	return t.sorted()
}

func serviceRows(d *proxyDump, want func(string) bool) table {
	t := table{header: []string{"NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"}}
	for _, svc := range d.Services {
		if !want(svc.Namespace) {
			continue
		}
		waypoint := "None"
		if svc.Waypoint != nil {
			waypoint = svc.Waypoint.Destination
		}
		var vips []string
		for _, v := range svc.VIPs {
			vips = append(vips, strings.TrimPrefix(v, "/"))
		}
		t.rows = append(t.rows, []string{svc.Namespace, svc.Name, dash(strings.Join(vips, ",")), waypoint, strconv.Itoa(len(svc.Endpoints))})
	}
	return t.sorted()
}

func policyRows(d *proxyDump, want func(string) bool) table {
	t := table{header: []string{"NAMESPACE", "POLICY NAME", "ACTION", "SCOPE", "RULES", "DRY RUN"}}
	for _, p := range d.Policies {
		if want(p.Namespace) {
			t.rows = append(t.rows, []string{p.Namespace, p.Name, p.Action, p.Scope, strconv.Itoa(len(p.Rules)), strconv.FormatBool(p.DryRun)})
		}
	}
	return t.sorted()
}

func certificateRows(d *proxyDump, want func(string) bool) table {
	t := table{header: []string{"CERTIFICATE NAME", "TYPE", "STATUS", "VALID", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE"}}
	for _, c := range d.Certificates {
		if !want(identityNamespace(c.Identity)) {
			continue
		}
		if len(c.CertChain) == 0 {
			t.rows = append(t.rows, []string{c.Identity, "Leaf", c.State, "false", "-", "-", "-"})
		}
		for i, link := range c.CertChain {
			kind := "Leaf"
			switch {
			case i == len(c.CertChain)-1 && i > 0:
				kind = "Root"
			case i > 0:
				kind = "Intermediate"
			}
			until, err := time.Parse(time.RFC3339, link.ExpirationTime)
			valid := err == nil && time.Now().Before(until)
			t.rows = append(t.rows, []string{c.Identity, kind, c.State, strconv.FormatBool(valid), link.SerialNumber, link.ExpirationTime, link.ValidFrom})
		}
	}
	return t
}

func connectionRows(d *proxyDump, want func(string) bool) table {
	t := table{header: []string{"WORKLOAD", "DIRECTION", "LOCAL", "REMOTE", "REMOTE TARGET", "PROTOCOL", "SENT", "RECEIVED", "AGE"}}
	for _, p := range d.Pods {
		if !want(p.Info.Namespace) {
			continue
		}
		name := p.Info.Name + "." + p.Info.Namespace
		for _, c := range p.Connections.Inbound {
			t.rows = append(t.rows, []string{name, "Inbound", c.ActualDst, withoutPort(c.Src), dash(c.Identity), c.Protocol, strconv.FormatInt(c.Sent, 10), strconv.FormatInt(c.Received, 10), c.Age})
		}
		for _, c := range p.Connections.Outbound {
			t.rows = append(t.rows, []string{name, "Outbound", c.Src, c.ActualDst, c.OriginalDst, c.Protocol, strconv.FormatInt(c.Sent, 10), strconv.FormatInt(c.Received, 10), c.Age})
		}
	}
	return t.sorted()
}

func withoutPort(address string) string {
	if h, _, err := net.SplitHostPort(address); err == nil {
		return h
	}
	return address
}

// sorted orders rows by their cells, so that two looks can be compared.
func (t table) sorted() table {
	slices.SortFunc(t.rows, slices.Compare)
	return t
}
